"""The context adapter on disk: what it says about itself and what it needs from a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import SchedulerMixin

from ..adapter_format import FORMAT_VERSION, LIBRARY, WEIGHTS_NAME, AdapterError
from ..context import ContextModule
from ..version import __version__
from .backbones import Backbone


# in which the noise schedule of training may differ from the base model's
SCHEDULE_OPTIONS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")


def check_base(config: dict[str, Any], backbone: Backbone, scheduler: SchedulerMixin) -> None:
    """Refuses a base model that the adapter was not trained for.

    Raises:
        AdapterError: naming what differs and the base model to load instead.
    """
    needed, found = config["base"], {"architecture": backbone.model_class.__name__}
    found |= backbone.requirements(scheduler.config)
    differences = [
        f"{key} is {found.get(key)}, not {value}" for key, value in needed.items() if found.get(key) != value
    ]
    if differences:
        raise AdapterError(
            f"This context adapter does not fit the loaded base model: {'; '.join(differences)}. Load the model that"
            f" it was trained on: {config['base_model_name_or_path']}."
        )


def adapter_config(
    context_module: ContextModule,
    backbone: Backbone,
    scheduler: SchedulerMixin,
    plain_scheduler: SchedulerMixin,
    base_model: str | None,
    mode: str,
) -> dict[str, Any]:
    """What an adapter says of itself; `scheduler` is that of training, `plain_scheduler` the base model's."""
    config = {
        "format_version": FORMAT_VERSION if context_module.config.nodes_without_noise else 1,
        "library": LIBRARY,
        "library_version": __version__,
        "base_model_name_or_path": base_model,
        "base": backbone.requirements(plain_scheduler.config),
        "concepts": list(context_module.config.concepts),
        "obs_context": context_module.config.obs_context,
        "mode": mode,
        "injection": backbone.injection,
    }
    own = {name: scheduler.config.get(name) for name in SCHEDULE_OPTIONS}
    differing = {name: value for name, value in own.items() if value != plain_scheduler.config.get(name)}
    if scheduler is not plain_scheduler and differing:
        config["scheduler"] = differing
    return config


def save_attention(backbone: Backbone, folder: Path) -> None:
    state = backbone.attention_layers.state_dict()
    weights = {name: weight.detach().contiguous().cpu() for name, weight in state.items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_attention(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS_NAME)


def load_attention(backbone: Backbone, weights: dict[str, torch.Tensor]) -> None:
    """Loads attention weights into a backbone that a context module is attached to.

    Raises:
        AdapterError: if they belong to other layers or have other shapes.
    """
    layers = backbone.attention_layers
    try:
        layers.load_state_dict(weights)
    except RuntimeError as error:
        raise AdapterError(
            f"{WEIGHTS_NAME} does not fit the {backbone.name}'s attention layers; load the base model that the adapter"
            f" was trained on. {str(error).splitlines()[0]}"
        ) from error
