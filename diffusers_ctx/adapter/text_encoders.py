"""The text encoders of a pipeline, and the LoRAs that are saved with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel

from .lora_layers import acting_loras, lora_layers, other_loras


_PEFT_PREFIX = "base_model.model."  # of the names of weights in PEFT's files


def text_encoders_of(components: Mapping[str, Any]) -> dict[str, PreTrainedModel]:
    """The text encoders among a pipeline's components, by name."""
    return {name: model for name, model in components.items() if name.startswith("text_encoder") and model is not None}


def tokenizer_of(text_encoder: str) -> str:
    """The component name of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


def save_loras_of_text_encoders(text_encoders: dict[str, PreTrainedModel], folder: Path) -> set[str]:
    """Saves LoRAs in the folder of a pipeline, where transformers loads them together with the text encoders.

    It loads one for each model: the active one. Those of a pipeline that was here before are removed.

    Returns:
        Names of the LoRAs that are left out.
    """
    left_out: set[str] = set()
    for component, model in text_encoders.items():
        loras = other_loras(model)
        layers = lora_layers(model)
        active = [name for name in acting_loras(layers[0]) if name in loras] if layers else []
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
