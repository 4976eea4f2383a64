"""The pretrained models, made ready to be trained on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ...adapter import attach_context_module, attached_adapter
from ...context import ContextModule
from ...pipelines import CompositionMixin
from ..config import ModelConfig


def prepare_backbone(
    pipeline: CompositionMixin, context_module: ContextModule, model: ModelConfig, accelerator: Accelerator
) -> None:
    """Moves the models to their device and type, and attaches the context module."""
    unet = pipeline.unet
    pipeline.to(accelerator.device)
    pipeline.vae.requires_grad_(False)
    for text_encoder in pipeline.text_encoders.values():
        text_encoder.requires_grad_(False)
    if model.mode != "full":  # there the UNet learns, and all of the pipeline is saved
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        for module in (unet, *pipeline.text_encoders.values()):
            module.to(torch.empty(0, device=accelerator.device, dtype=dtype))  # of a bare dtype diffusers warns
    attach_context_module(unet, context_module, model.injection)
    attached_adapter(unet).trained_full = model.mode == "full"
    context_module.float()
    if model.injection == "prompt":  # tokens of zeros take a little of the attention and add nothing
        torch.nn.init.zeros_(context_module.read_out.norm.weight)
    if model.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        for text_encoder in learning_text_encoders(pipeline, model):
            # the reentrant kind has no gradients where the input has none, and embeddings are frozen
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if model.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()


def learning_text_encoders(pipeline: CompositionMixin, model: ModelConfig) -> list[PreTrainedModel]:
    """The text encoders that learn a LoRA."""
    return list(pipeline.text_encoders.values()) if model.train_text_encoder else []
