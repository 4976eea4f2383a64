"""What learns: the adapter alone (`frozen`), a LoRA too (`lora`), or the whole UNet (`full`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...adapter import (
    LORA_ADAPTER,
    attach_context_module,
    attached_adapter,
    attached_context_module,
    context_attention_layers,
)
from ...context import ContextModule
from ...pipelines import CompositionMixin, Conditioner
from ..config import ModelConfig


LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def prepare_backbone(
    pipeline: CompositionMixin, context_module: ContextModule, model: ModelConfig, accelerator: Accelerator
) -> None:
    """Moves the models to their device and type, and attaches the context module."""
    unet, text_encoders = pipeline.unet, Conditioner.of(pipeline).text_encoders.values()
    pipeline.to(accelerator.device)
    pipeline.vae.requires_grad_(False)
    for text_encoder in text_encoders:
        text_encoder.requires_grad_(False)
    if model.mode != "full":  # there the UNet learns, and all of the pipeline is saved
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        for module in (unet, *text_encoders):
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
    return list(Conditioner.of(pipeline).text_encoders.values()) if model.train_text_encoder else []


def prepare_mode(
    unet: UNet2DConditionModel, mode: str, rank: int, text_encoders: Sequence[PreTrainedModel] = ()
) -> None:
    """Sets which parameters of a UNet with a context module learn, and adds the LoRA of mode `lora`, also to the text
    encoders that are to learn.

    Of the context module only the read-out goes on learning beside the UNet: what the concepts are was learned before,
    and the UNet's loss would undo the match between posterior and prior.
    """
    unet.requires_grad_(mode == "full")
    if mode == "lora":
        unet.add_adapter(_lora_config(rank, LORA_TARGETS), adapter_name=LORA_ADAPTER)
    for text_encoder in text_encoders:
        text_encoder.add_adapter(_lora_config(rank, TEXT_LORA_TARGETS), adapter_name=LORA_ADAPTER)
    # adding a LoRA freezes everything else, so this comes last
    unet.encoder_hid_proj.requires_grad_(False)
    for module in adapter_modules(unet):
        module.requires_grad_(True)


@contextmanager
def gradients_off(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What is computed while this is open has no gradients of these parameters, which saves the time they take."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def adapter_modules(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The parts of the adapter that learn together with the UNet."""
    context_module = attached_context_module(unet)
    assert context_module is not None
    return [context_module.read_out, context_attention_layers(unet)]


def split_parameters(
    unet: UNet2DConditionModel, text_encoders: Sequence[PreTrainedModel] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that learn: those of the adapter, and those of the backbone (LoRAs or UNet)."""
    adapter = [parameter for module in adapter_modules(unet) for parameter in module.parameters()]
    known = {id(parameter) for parameter in adapter}
    backbone = [
        parameter
        for model in (unet, *text_encoders)
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in known
    ]
    return adapter, backbone


def count_learned(
    unet: UNet2DConditionModel, mode: str, rank: int, text_encoders: Sequence[PreTrainedModel] = ()
) -> int:
    """How many numbers will learn in a mode, before `prepare_mode` has made them."""
    adapter = sum(parameter.numel() for module in adapter_modules(unet) for parameter in module.parameters())
    if mode == "frozen":
        return adapter
    if mode == "full":
        known = {id(parameter) for parameter in unet.encoder_hid_proj.parameters()}
        known |= {id(parameter) for parameter in context_attention_layers(unet).parameters()}
        return adapter + sum(parameter.numel() for parameter in unet.parameters() if id(parameter) not in known)
    text_layers = [layer for model in text_encoders for layer in _linear_layers(model, TEXT_LORA_TARGETS)]
    layers = [*_linear_layers(unet, LORA_TARGETS), *text_layers]
    return adapter + sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _lora_config(rank: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def _linear_layers(model: nn.Module, targets: list[str]) -> list[nn.Linear]:
    ends = tuple(f".{target}" for target in targets)
    return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ends)]
