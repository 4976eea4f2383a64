"""Pre-flight checks: fail in seconds, not after hours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from ..adapter import backbone_of_pipeline
from ..data import context_mask
from ..pipelines import CompositionMixin
from .config import TrainingConfig


def check_options(config: TrainingConfig, resolution: int, pipeline: CompositionMixin) -> None:
    """Checks what the config groups cannot check alone: options against the model, the installation and one another.

    Args:
        config: the run's options.
        resolution: height and width of the images, in pixels.
        pipeline: the base model.

    Raises:
        ValueError: if an option cannot work.
    """
    backbone = backbone_of_pipeline(pipeline)
    multiple = pipeline.vae_scale_factor * backbone.patch_size
    if resolution % multiple:
        raise ValueError(f"`resolution` is {resolution}; this model needs a multiple of {multiple}.")
    if (gamma := config.optimization.snr_gamma) is not None:
        backbone.noising(pipeline.scheduler.config).min_snr_weights(torch.zeros(1, dtype=torch.int64), gamma)
    if config.data.streaming:
        _check_streaming(config)
    trackers = ["none", "all", *map(str, get_available_trackers())]
    if config.output.report_to not in trackers:  # Accelerate would ignore it
        raise ValueError(
            f"`report_to` is '{config.output.report_to}', and no tracker of that name is installed; install it, or"
            f" choose one of {trackers}."
        )


def _check_streaming(config: TrainingConfig) -> None:
    data = config.data
    changes: list[str] = []
    if config.optimization.max_train_steps is None:
        changes.append("set `max_train_steps`: the number of images in an epoch is not known")
    if data.cache_latents:
        changes.append("leave out `cache_latents`: images are encoded in each step")
    if data.validation_images:
        changes.append("leave out `validation_images`: the stream would train on held-out images")
    if data.max_train_samples is not None:
        changes.append("give `streaming_concept_images` instead of `max_train_samples`")
    if config.context.posterior_encoder != "vae":
        changes.append("set `posterior_encoder` to vae: other features are computed once, before training")
    if changes:
        raise ValueError(f"With `streaming`, {'; '.join(changes)}.")


def check_backbone(pipeline: DiffusionPipeline) -> None:
    """Checks that the pipeline fits its backbone, and that the backbone is one for text-to-image.

    Raises:
        ValueError: if checkpoint and pipeline are of different families, or if the backbone and the autoencoder have
            different numbers of latent channels.
    """
    backbone = backbone_of_pipeline(pipeline)
    backbone.check_pipeline(pipeline)
    inputs, latents = backbone.latent_channels, pipeline.vae.config.latent_channels
    if inputs != latents:  # inpainting: 9 and 4
        raise ValueError(
            f"The checkpoint's {backbone.name} takes {inputs} channels, and its autoencoder makes {latents}: it needs"
            " more than an image's latents, as for inpainting; choose a text-to-image checkpoint."
        )


def check_accelerator(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Checks that the device supports the precision, and that FSDP or DeepSpeed give the result of plain data
    parallelism and can be saved.

    Raises:
        ValueError: naming what to set.
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
    if plugin.activation_checkpointing:  # it renames the saved weights
        yield "give `--gradient_checkpointing` instead of `fsdp_activation_checkpointing`"
    if config.optimization.optimizer != "adamw":
        yield "set `optimizer` to adamw"
    if config.model.train_text_encoder:
        yield "leave out `train_text_encoder`"
    if config.optimization.composition_weight:  # processes would differ in their passes of the backbone
        yield "set `composition_weight` to 0"
    if config.output.validation_prompt is not None or config.data.validation_images:
        yield "leave out `validation_prompt` and `validation_images`"  # the main process has only its shards


def _changes_for_deepspeed(accelerator: Accelerator, config: TrainingConfig) -> Iterator[str]:
    plugin, accumulation = accelerator.state.deepspeed_plugin, config.optimization.gradient_accumulation_steps
    if plugin.zero_stage not in (1, 2):
        yield "set `zero_stage` to 1 or 2"
    if plugin.deepspeed_config.get("gradient_accumulation_steps") not in ("auto", accumulation):
        yield f"set DeepSpeed's `gradient_accumulation_steps` to {accumulation}"
    if plugin.offload_optimizer_device not in (None, "none"):  # its optimizer ignores changes of the learning rate
        yield "set `offload_optimizer_device` to none"
    if accelerator.mixed_precision != "no":  # it would round the weights that learn
        yield "set `mixed_precision` to no, or use FSDP2"
    if config.model.mode != "frozen" and config.model.unfreeze_after:  # it steps before gradients can be discarded
        yield "set `unfreeze_after` to 0, or use FSDP2"
    if config.model.train_text_encoder:
        yield "leave out `train_text_encoder`"
    if config.data.streaming:  # it takes the batch size from a data loader
        yield "leave out `streaming`"
    if config.optimization.optimizer != "adamw":  # each process sees only its part of the weights
        yield "set `optimizer` to adamw"


def check_validation_contexts(contexts: Sequence[str], concepts: Sequence[str], obs_context: str) -> None:
    """Checks that every context to validate consists of known concepts.

    Raises:
        ValueError: if one does not.
    """
    try:
        context_mask(contexts, concepts, obs_context)
    except ValueError as error:
        raise ValueError(f"`validation_interventions` cannot be used: {error}") from error
