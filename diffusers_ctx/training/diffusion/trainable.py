"""What learns: the adapter alone (`frozen`), a LoRA too (`lora`), or the whole backbone (`full`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...adapter import LORA_ADAPTER, backbone_of, backbone_of_pipeline
from ...context import ContextModule
from ...pipelines import CompositionMixin, Conditioner
from ..config import ModelConfig, TrainingConfig


TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def with_injection(config: TrainingConfig, pipeline: CompositionMixin) -> TrainingConfig:
    """The configuration with the way of context tokens chosen, if it leaves that open."""
    injection = config.model.injection or backbone_of_pipeline(pipeline).injections[0]
    return replace(config, model=replace(config.model, injection=injection))


def prepare_backbone(
    pipeline: CompositionMixin, context_module: ContextModule, model: ModelConfig, accelerator: Accelerator
) -> None:
    """Moves the models to their device and type, and attaches the context module."""
    backbone, text_encoders = backbone_of_pipeline(pipeline), Conditioner.of(pipeline).text_encoders.values()
    pipeline.to(accelerator.device)
    pipeline.vae.requires_grad_(False)
    for text_encoder in text_encoders:
        text_encoder.requires_grad_(False)
    if model.mode != "full":  # there the backbone learns, and all of the pipeline is saved
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        for module in (backbone.model, *text_encoders):
            module.to(torch.empty(0, device=accelerator.device, dtype=dtype))  # of a bare dtype diffusers warns
    backbone.attach(context_module, model.injection)
    backbone.adapter.trained_full = model.mode == "full"
    context_module.float()
    if backbone.injection == "prompt":  # tokens of zeros take a little of the attention and add next to nothing
        torch.nn.init.zeros_(context_module.read_out.norm.weight)
    if model.gradient_checkpointing:
        backbone.model.enable_gradient_checkpointing()
        for text_encoder in learning_text_encoders(pipeline, model):
            # the reentrant kind has no gradients where the input has none, and embeddings are frozen
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if model.enable_xformers_memory_efficient_attention:
        backbone.model.enable_xformers_memory_efficient_attention()


def learning_text_encoders(pipeline: CompositionMixin, model: ModelConfig) -> list[PreTrainedModel]:
    """The text encoders that learn a LoRA."""
    return list(Conditioner.of(pipeline).lora_text_encoders.values()) if model.train_text_encoder else []


def prepare_mode(model: ModelMixin, mode: str, rank: int, text_encoders: Sequence[PreTrainedModel] = ()) -> None:
    """Sets which parameters of a model with a context module learn, and adds the LoRA of mode `lora`, also to the text
    encoders that are to learn.

    Of the context module only the read-out goes on learning along with the model: what the concepts are was learned
    before, and the model's loss would undo the match between posterior and prior.
    """
    backbone = backbone_of(model)
    model.requires_grad_(mode == "full")
    if mode == "lora":
        model.add_adapter(_lora_config(rank, list(backbone.lora_targets)), adapter_name=LORA_ADAPTER)
    for text_encoder in text_encoders:
        text_encoder.add_adapter(_lora_config(rank, TEXT_LORA_TARGETS), adapter_name=LORA_ADAPTER)
    # adding a LoRA freezes everything else, so this comes last
    assert backbone.projection is not None
    backbone.projection.requires_grad_(False)
    for module in adapter_modules(model):
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


def adapter_modules(model: ModelMixin) -> list[nn.Module]:
    """The parts of the adapter that learn together with the model."""
    backbone = backbone_of(model)
    context_module = backbone.context_module
    assert context_module is not None
    return [context_module.read_out, backbone.attention_layers]


def split_parameters(
    model: ModelMixin, text_encoders: Sequence[PreTrainedModel] = ()
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that learn: those of the adapter, and those of the backbone (LoRAs, or all)."""
    adapter = [parameter for module in adapter_modules(model) for parameter in module.parameters()]
    known = {id(parameter) for parameter in adapter}
    backbone = [
        parameter
        for part in (model, *text_encoders)
        for parameter in part.parameters()
        if parameter.requires_grad and id(parameter) not in known
    ]
    return adapter, backbone


def count_learned(model: ModelMixin, mode: str, rank: int, text_encoders: Sequence[PreTrainedModel] = ()) -> int:
    """How many numbers will learn in a mode, before `prepare_mode` has made them."""
    backbone = backbone_of(model)
    adapter = sum(parameter.numel() for module in adapter_modules(model) for parameter in module.parameters())
    if mode == "frozen":
        return adapter
    if mode == "full":
        assert backbone.projection is not None
        known = {id(parameter) for parameter in backbone.projection.parameters()}
        known |= {id(parameter) for parameter in backbone.attention_layers.parameters()}
        return adapter + sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in known)
    text_layers = [layer for encoder in text_encoders for layer in _linear_layers(encoder, TEXT_LORA_TARGETS)]
    layers = [*_linear_layers(model, backbone.lora_targets), *text_layers]
    return adapter + sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _lora_config(rank: int, targets: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def _linear_layers(model: nn.Module, targets: Sequence[str]) -> list[nn.Linear]:
    ends = tuple(f".{target}" for target in targets)
    return [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.endswith(ends)]
