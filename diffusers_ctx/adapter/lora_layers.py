"""LoRA layers of a model: whose they are, how they act, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .offloading import move_to


LORA_ADAPTER = "context"  # PEFT's name of the adapter's own LoRA

_LORA_LOADED = "_hf_peft_config_loaded"  # marks models of diffusers and transformers that have a LoRA


@contextmanager
def lora_detached(model: nn.Module) -> Iterator[None]:
    """While it is open, `model` has no LoRA layers, and its weights the names of the base model.

    Raises:
        ValueError: if LoRAs are fused into the weights.
    """
    check_unfused(model)
    tuned = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    loaded = getattr(model, _LORA_LOADED, False)
    for name, layer in tuned.items():
        model.set_submodule(name, layer.get_base_layer())
    setattr(model, _LORA_LOADED, False)  # otherwise text encoders would save the LoRA instead of their weights
    try:
        yield
    finally:
        setattr(model, _LORA_LOADED, loaded)
        for name, layer in tuned.items():
            model.set_submodule(name, layer)
            move_to(layer, layer.get_base_layer().weight.device)


def check_unfused(model: nn.Module) -> None:
    """Checks that the model has the weights of the base model.

    Raises:
        ValueError: if LoRAs are fused into them.
    """
    if any(layer.merged for layer in lora_layers(model)):
        raise ValueError(
            "LoRAs are fused into the weights, and those of the base model are needed: call `unfuse_lora()` first."
        )


def other_loras(model: nn.Module) -> set[str]:
    """Names of a model's LoRAs, except the context adapter's."""
    return set(loras_of(model)) - {LORA_ADAPTER}


def loras_of(model: nn.Module) -> dict[str, Any]:
    return getattr(model, "peft_config", {})


def active_loras(model: nn.Module) -> list[str]:
    layers = lora_layers(model)
    return list(layers[0].active_adapters) if layers else []


def lora_weight(layer: BaseTunerLayer) -> float:
    """The weight of the adapter's LoRA in a layer, 1 as trained."""
    rank = layer.r[LORA_ADAPTER]
    as_trained = layer.lora_alpha[LORA_ADAPTER] / (rank**0.5 if layer.use_rslora.get(LORA_ADAPTER) else rank)
    return layer.scaling[LORA_ADAPTER] / as_trained


def acting_loras(layer: BaseTunerLayer) -> list[str]:
    return layer.merged_adapters or ([] if layer.disable_adapters else layer.active_adapters)


def lora_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
