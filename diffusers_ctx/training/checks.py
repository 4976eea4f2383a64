"""What would stop a run later is looked for before it starts."""

from __future__ import annotations

import logging
import math
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from ..adapter_format import INJECTIONS
from ..data import context_mask
from ..pipelines import CompositionMixin
from .config import TrainingConfig
from .diffusion.objective import PREDICTION_TYPES
from .diffusion.timesteps import TIMESTEP_SAMPLING
from .run.checkpoints import checkpoint_step, list_checkpoints
from .run.record import flatten_options


logger = logging.getLogger(__name__)

# numbers per weight
_KEPT_BY_OPTIMIZER = {"adamw": 2, "adamw_8bit": 0.5, "prodigy": 4}
_SMALLEST = {
    "rank": 1,
    "max_train_samples": 1,
    "validation_images": 0,
    "dataloader_num_workers": 0,
    "streaming_concept_images": 1,
    "streaming_shuffle_buffer": 1,
    "resolution": 1,
    "num_hidden_factors": 0,
    "noise_dim": 1,
    "tokens_per_concept": 1,
    "expressive_depth": 0,
    "kl_weight": 0,
    "kl_warmup_steps": 1,
    "contrastive_weight": 0,
    "matching_weight": 0,
    "generation_weight": 0,
    "acyclicity_weight": 0,
    "sparsity_weight": 0,
    "concept_steps": 2,  # the contrast goes first, alone
    "concept_batch_size": 1,
    "seed": 0,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "adam_weight_decay": 0,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "validation_steps": 1,
    "num_validation_images": 1,
}
_LARGEST = {"seed": 2**32 - 1}  # NumPy's
_ABOVE_ZERO = ("concept_learning_rate", "learning_rate", "snr_gamma", "adam_epsilon", "max_grad_norm")
_SHARES = ("proportion_empty_prompts", "ema_decay")
_BELOW_ONE = ("adam_beta1", "adam_beta2")


def check_base_model(name: str) -> None:
    """Checks, before it is loaded, that the base model is a folder, or could be on the Hub.

    Raises:
        ValueError: if it is neither.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        found = "no folder" if Path(name).exists() else "not there"
        raise ValueError(
            f"`pretrained_model_name_or_path` '{name}' is {found}, and no name on the Hub; give the folder of a"
            " pipeline that diffusers saved, or a name such as stabilityai/stable-diffusion-xl-base-1.0."
        ) from error


def check_options(config: TrainingConfig, vae_scale_factor: int) -> None:
    """Checks what is known without the data.

    Raises:
        ValueError: if an option cannot work.
        ImportError: if an option needs a package that is not installed.
    """
    _check_ranges(flatten_options(config))
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
    if config.model.injection not in INJECTIONS:
        raise ValueError(f"Unknown injection '{config.model.injection}'; choose one of {list(INJECTIONS)}.")
    if config.output.validation_interventions and config.output.validation_prompt is None:
        raise ValueError(
            "`validation_interventions` says what to draw, and nothing is drawn without a prompt; give a"
            " `validation_prompt`, or leave them out."
        )
    if config.data.streaming:
        _check_streaming(config)
    trackers = ["none", "all", *map(str, get_available_trackers())]
    if config.output.report_to not in trackers:  # Accelerate would leave it out and go on
        raise ValueError(
            f"`report_to` is '{config.output.report_to}', and no tracker of that name is installed; install it, or"
            f" choose one of {trackers}."
        )


def _check_ranges(options: dict[str, Any]) -> None:
    """Checks numbers that training would take, and then learn nothing from, or the opposite."""
    for name, value in options.items():
        if value is None:
            continue
        # asked in such a way that `nan` is refused too
        if name in _SMALLEST and not value >= _SMALLEST[name]:
            raise ValueError(f"`{name}` is {value}; it must be {_SMALLEST[name]} or more.")
        if name in _LARGEST and not value <= _LARGEST[name]:
            raise ValueError(f"`{name}` is {value}; it must be {_LARGEST[name]} or less.")
        if name in _ABOVE_ZERO and not value > 0:
            raise ValueError(f"`{name}` is {value}; it must be above 0.")
        if name in _SHARES and not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {value}; it is a share in [0, 1].")
        if name in _BELOW_ONE and not 0 <= value < 1:
            raise ValueError(f"`{name}` is {value}; it must be in [0, 1).")
        if isinstance(value, float) and not math.isfinite(value) and name != "max_grad_norm":  # which may be infinite
            raise ValueError(f"`{name}` is {value}; it must be finite.")


def _check_streaming(config: TrainingConfig) -> None:
    data = config.data
    changes: list[str] = []
    if config.optimization.max_train_steps is None:
        changes.append("set `max_train_steps`: how many images an epoch has is not known")
    if data.cache_latents:
        changes.append("leave out `cache_latents`: images are encoded whenever they are seen")
    if data.validation_images:
        changes.append("leave out `validation_images`: what they hold out, the stream would show again")
    if data.max_train_samples is not None:
        changes.append("give `streaming_concept_images` in the place of `max_train_samples`")
    if config.context.posterior_encoder != "vae":
        changes.append("set `posterior_encoder` to vae: features are made once of images that stay")
    if changes:
        raise ValueError(f"With `streaming`, {'; '.join(changes)}.")


def check_backbone(pipeline: DiffusionPipeline) -> None:
    """Checks that the pipeline tells its UNet what this one asks for, and that it sees latents and nothing else.

    Raises:
        ValueError: if the checkpoint is of Stable Diffusion XL and the pipeline is not, or the other way round; or the
            UNet takes another number of channels than the autoencoder makes.
    """
    asks, tells = pipeline.unet.config.addition_embed_type == "text_time", hasattr(pipeline, "text_encoder_2")
    if asks != tells:
        script = f"train_context_text_to_image{'_sdxl' if asks else ''}.py"
        raise ValueError(f"The checkpoint is {'' if asks else 'not '}of Stable Diffusion XL; train it with {script}.")
    takes, makes = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != makes:  # inpainting: 9 for 4
        raise ValueError(
            f"The checkpoint's UNet takes {takes} channels, and its autoencoder makes {makes}: it sees more than an"
            " image's latents, as for inpainting; choose a text-to-image checkpoint."
        )


def check_accelerator(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Checks that the device computes in the precision that was asked for, and that FSDP or DeepSpeed would train as
    plain data parallelism does, and could be saved.

    Raises:
        ValueError: if not, naming what to set. Accelerate would ignore the precision, and types would clash in the
            first step.
    """
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("Mixed precision in fp16 needs a GPU; on a CPU set `mixed_precision` to bf16 or no.")
    changes: list[str] = []
    if accelerator.distributed_type == DistributedType.FSDP:
        changes += _changes_for_fsdp(accelerator, config)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        changes += _changes_for_deepspeed(accelerator, config)
    if changes:
        raise ValueError(
            f"With {accelerator.distributed_type.value}, {'; '.join(changes)}. See docs/multi_gpu.md for what works."
        )


def _changes_for_fsdp(accelerator: Accelerator, config: TrainingConfig) -> Iterator[str]:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        yield "set `fsdp_version` to 2"
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        yield "set `fsdp_auto_wrap_policy` to TRANSFORMER_BASED_WRAP"
    if plugin.activation_checkpointing:  # it renames what is saved
        yield "give `--gradient_checkpointing` in the place of `fsdp_activation_checkpointing`"
    if config.optimization.optimizer != "adamw":
        yield "set `optimizer` to adamw"
    if config.model.train_text_encoder:
        yield "leave out `train_text_encoder`"
    if config.output.validation_prompt is not None or config.data.validation_images:
        yield "leave out `validation_prompt` and `validation_images`"  # the main process has but its shards


def _changes_for_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> Iterator[str]:
    plugin, accumulation = accelerator.state.deepspeed_plugin, config.optimization.gradient_accumulation_steps
    if plugin.zero_stage not in (1, 2):
        yield "set `zero_stage` to 1 or 2"
    if plugin.deepspeed_config.get("gradient_accumulation_steps") not in ("auto", accumulation):
        yield f"set DeepSpeed's `gradient_accumulation_steps` to {accumulation}"
    if plugin.offload_optimizer_device not in (None, "none"):  # that optimizer would not see the learning rate change
        yield "set `offload_optimizer_device` to none"
    if accelerator.mixed_precision != "no":  # it would round what learns
        yield "set `mixed_precision` to no, or use FSDP2"
    if config.model.mode != "frozen" and config.model.unfreeze_after:  # it steps before gradients can be left out
        yield "set `unfreeze_after` to 0, or use FSDP2"
    if config.model.train_text_encoder:
        yield "leave out `train_text_encoder`"
    if config.data.streaming:  # it takes the size of a batch from a data loader
        yield "leave out `streaming`"
    if config.optimization.optimizer != "adamw":  # each process would see but its part of the weights
        yield "set `optimizer` to adamw"


def check_validation_contexts(contexts: Sequence[str], concepts: Sequence[str], obs_context: str) -> None:
    """Checks that every context to validate is made of known concepts.

    Raises:
        ValueError: if one is not.
    """
    try:
        context_mask(contexts, concepts, obs_context)
    except ValueError as error:
        raise ValueError(f"`validation_interventions` cannot be used: {error}") from error


def check_free_disk(
    folder: Path,
    config: TrainingConfig,
    learned: int,
    pipeline: CompositionMixin,
    accelerator: Accelerator,
    start: int,
    end: int,
) -> None:
    """Checks that checkpoints and the adapter fit where they are saved; warns where but the next checkpoints would.

    Args:
        folder: where they are saved.
        config: the run.
        learned: how many numbers will learn beside the concepts.
        pipeline: the pipeline that learns, with its context adapter.
        accelerator: says whether weights are in shards.
        start: the step that the run goes on from; -1 where it has the concepts to learn first.
        end: its last step.

    Raises:
        OSError: if not even a checkpoint fits beside the one that it replaces, or the adapter beside the last one.
    """
    output = config.output
    first, checkpoint = (_size_of_checkpoint(step, config, learned, pipeline, accelerator) for step in (0, end))
    due = sorted({*range(0, end, output.checkpointing_steps), end})
    new = [checkpoint if step else first for step in due if step > start]
    before = (step for step in map(checkpoint_step, list_checkpoints(folder)) if step <= start)
    there = [checkpoint if step else first for step in before]
    adapter = _size_of_adapter(config, learned, pipeline)
    free = shutil.disk_usage(folder).free
    if free < (least := _most_at_once(there, new, adapter, limit=1)):
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, and this run needs {least / 1e9:.1f} GB or more: a checkpoint"
            f" takes {checkpoint / 1e9:.1f} GB, beside the one before it, and what is saved in the end takes"
            f" {adapter / 1e9:.1f} GB. Free some, or choose another `output_dir`."
        )
    if free < _most_at_once(there, new, adapter, output.checkpoints_total_limit):
        logger.warning(
            f"{len(new)} checkpoints of {checkpoint / 1e9:.1f} GB, and what is saved in the end, do not fit into the"
            f" {free / 1e9:.1f} GB that {folder} has free; lower `checkpoints_total_limit`, or raise"
            " `checkpointing_steps`."
        )


def _size_of_adapter(config: TrainingConfig, learned: int, pipeline: CompositionMixin) -> float:
    """Bytes of what is saved in the end: the adapter, and in mode full the pipeline that it belongs to."""
    adapter = 4 * learned + _size_of_concepts(pipeline)
    if config.model.mode != "full":
        return adapter
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    return adapter + sum(_size(model) for model in models if model is not pipeline.unet)  # all of which learned


def _size_of_checkpoint(
    step: int, config: TrainingConfig, learned: int, pipeline: CompositionMixin, accelerator: Accelerator
) -> float:
    """Bytes of what learns, in float32, what the optimizer keeps of each number, the average, and the concepts."""
    options = config.optimization
    kept = _KEPT_BY_OPTIMIZER[options.optimizer] if step else 0  # from its first step on
    size = 4 * (1 + kept + options.use_ema) * learned + _size_of_concepts(pipeline)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        size += _size(pipeline.unet)  # with the base model
    return size


def _size_of_concepts(pipeline: CompositionMixin) -> int:
    """Bytes of the context module without the read-out, which learns with the adapter."""
    return _size(pipeline.context_module) - _size(pipeline.context_module.read_out)


def _size(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())


def _most_at_once(there: Sequence[float], new: Sequence[float], adapter: float, limit: int | None) -> float:
    """How much more is on the disk than before, at its worst, where each new checkpoint is written before the oldest
    ones beyond `limit` are removed, and the adapter in the end."""
    kept = deque(there)
    used = most = 0.0
    for checkpoint in new:
        kept.append(checkpoint)
        used += checkpoint
        most = max(most, used)
        while limit and len(kept) > limit:
            used -= kept.popleft()
    return max(most, used + adapter)
