"""What would stop a run later is looked for before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.optimization import SchedulerType

from ..data import context_mask
from .config import TrainingConfig
from .noise import TIMESTEP_SAMPLING
from .objective import PREDICTION_TYPES
from .optimizer import check_optimizer
from .record import options_of


_SMALLEST = {
    "rank": 1,
    "validation_images": 0,
    "resolution": 1,
    "noise_dim": 1,
    "tokens_per_concept": 1,
    "kl_warmup_steps": 1,
    "abduction_steps": 2,  # the contrast goes first, alone
    "abduction_batch_size": 1,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "validation_steps": 1,
    "num_validation_images": 1,
}


def check_options(config: TrainingConfig, vae_scale_factor: int) -> None:
    """Checks what is known without the data.

    Raises:
        ValueError: if an option cannot work.
        ImportError: if an option needs a package that is not installed.
    """
    options = options_of(config)
    for name, smallest in _SMALLEST.items():
        if options[name] is not None and options[name] < smallest:
            raise ValueError(f"`{name}` is {options[name]}; it must be {smallest} or more.")
    if not 0 <= config.data.proportion_empty_prompts <= 1:
        raise ValueError(
            f"`proportion_empty_prompts` is {config.data.proportion_empty_prompts}; it is a share in [0, 1]."
        )
    if (config.data.resolution or 0) % vae_scale_factor:
        raise ValueError(
            f"`resolution` is {config.data.resolution}; this model's autoencoder needs a multiple of"
            f" {vae_scale_factor}."
        )
    if config.model.prediction_type not in (None, *PREDICTION_TYPES):
        raise ValueError(
            f"Unknown prediction_type '{config.model.prediction_type}'; choose one of {list(PREDICTION_TYPES)}."
        )
    if config.optimization.timestep_sampling not in TIMESTEP_SAMPLING:
        raise ValueError(
            f"Unknown timestep_sampling '{config.optimization.timestep_sampling}'; choose one of"
            f" {list(TIMESTEP_SAMPLING)}."
        )
    check_optimizer(config.optimization)
    schedules = [kind.value for kind in SchedulerType]
    if config.optimization.lr_scheduler not in schedules:
        raise ValueError(f"Unknown lr_scheduler '{config.optimization.lr_scheduler}'; choose one of {schedules}.")


def check_backbone(pipeline: DiffusionPipeline) -> None:
    """Checks that the pipeline tells its UNet what this one asks for.

    Raises:
        ValueError: if the checkpoint is of Stable Diffusion XL and the pipeline is not, or the other way round.
    """
    asks, tells = pipeline.unet.config.addition_embed_type == "text_time", hasattr(pipeline, "text_encoder_2")
    if asks != tells:
        script = f"train_context_text_to_image{'_sdxl' if asks else ''}.py"
        raise ValueError(f"The checkpoint is {'' if asks else 'not '}of Stable Diffusion XL; train it with {script}.")


def check_precision(accelerator: Accelerator) -> None:
    """Checks that the device computes in the precision that was asked for.

    Raises:
        ValueError: if it does not; Accelerate would ignore it, and types would clash in the first step.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("Mixed precision in fp16 needs a GPU; on a CPU set `mixed_precision` to bf16 or no.")


def check_validation_contexts(contexts: Sequence[str], concepts: Sequence[str], obs_context: str) -> None:
    """Checks that every context to validate is made of known concepts.

    Raises:
        ValueError: if one is not.
    """
    try:
        context_mask(contexts, concepts, obs_context)
    except ValueError as error:
        raise ValueError(f"`validation_interventions` cannot be used: {error}") from error


def check_writable(folder: Path) -> None:
    """Makes the folder if need be, and checks that files can be written to it.

    Raises:
        OSError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"`output_dir` {folder} cannot be written to ({error.strerror}); choose another.") from error
