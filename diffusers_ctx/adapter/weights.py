"""The context adapter on disk: what it says about itself and what it needs from a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from ..adapter_format import FORMAT_VERSION, LIBRARY, WEIGHTS_NAME, AdapterError
from ..context import ContextModule
from ..version import __version__
from .attention import context_attention_layers, injection_of


# in which the noise schedule of training may differ from the base model's
SCHEDULE_OPTIONS = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")


def base_requirements(unet: UNet2DConditionModel, prediction_type: str) -> dict[str, Any]:
    """What an adapter trained on this UNet needs to find again in the one that it is loaded on."""
    return {
        "in_channels": unet.config.in_channels,
        "block_out_channels": list(unet.config.block_out_channels),
        "cross_attention_dim": unet.config.cross_attention_dim,
        "addition_embed_type": unet.config.addition_embed_type,
        "prediction_type": prediction_type,
    }


def check_base(config: dict[str, Any], unet: UNet2DConditionModel, prediction_type: str) -> None:
    """Refuses a base model that the adapter was not trained for.

    Raises:
        AdapterError: naming what differs and the base model to load instead.
    """
    needed, found = config["base"], base_requirements(unet, prediction_type)
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
    unet: UNet2DConditionModel,
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
        "base": base_requirements(unet, plain_scheduler.config.prediction_type),
        "concepts": list(context_module.config.concepts),
        "obs_context": context_module.config.obs_context,
        "mode": mode,
        "injection": injection_of(unet),
    }
    own = {name: scheduler.config.get(name) for name in SCHEDULE_OPTIONS}
    differing = {name: value for name, value in own.items() if value != plain_scheduler.config.get(name)}
    if scheduler is not plain_scheduler and differing:
        config["scheduler"] = differing
    return config


def save_attention(unet: UNet2DConditionModel, folder: Path) -> None:
    state = context_attention_layers(unet).state_dict()
    weights = {name: weight.detach().contiguous().cpu() for name, weight in state.items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_attention(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS_NAME)


def load_attention(unet: UNet2DConditionModel, weights: dict[str, torch.Tensor]) -> None:
    """Loads attention weights into a UNet that a context module is attached to.

    Raises:
        AdapterError: if they belong to other layers or have other shapes.
    """
    layers = context_attention_layers(unet)
    try:
        layers.load_state_dict(weights)
    except RuntimeError as error:
        raise AdapterError(
            f"{WEIGHTS_NAME} does not fit the UNet's attention layers; load the base model that the adapter was"
            f" trained on. {str(error).splitlines()[0]}"
        ) from error
