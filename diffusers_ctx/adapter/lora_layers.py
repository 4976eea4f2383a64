"""LoRA layers of a model: whose they are, how they act, and the model without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedModel

from .offloading import move_to


LORA_ADAPTER = "context"  # PEFT's name of the adapter's own LoRA

_PEFT_PREFIX = "base_model.model."  # of the names of weights in PEFT's files
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


def save_loras_of_text_encoders(text_encoders: dict[str, PreTrainedModel], folder: Path) -> set[str]:
    """Saves LoRAs in the folder of a pipeline, where transformers loads them together with the text encoders.

    It loads one for each model: the active one. Those of a pipeline that was here before are removed.

    Returns:
        Names of the LoRAs that are left out.
    """
    left_out: set[str] = set()
    for component, model in text_encoders.items():
        loras = other_loras(model)
        active = [name for name in active_loras(model) if name in loras]
        (folder / component).mkdir(parents=True, exist_ok=True)
        for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            (folder / component / file).unlink(missing_ok=True)
        if len(active) == 1:
            state = model.get_adapter_state_dict(active[0])
            weights = {f"{_PEFT_PREFIX}{name}": weight.detach().cpu().contiguous() for name, weight in state.items()}
            safetensors.torch.save_file(weights, folder / component / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
            # without the base model's folder, where it was loaded from: its weights are beside it now
            replace(model.peft_config[active[0]], base_model_name_or_path=None).save_pretrained(folder / component)
            loras -= {active[0]}
        left_out |= loras
    return left_out


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
