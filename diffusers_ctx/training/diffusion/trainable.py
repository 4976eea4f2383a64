"""What learns: the adapter alone (`frozen`), a LoRA too (`lora`), or the whole UNet (`full`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers import SchedulerMixin, UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ...adapter import LORA_ADAPTER, attached_context_module, context_attention_layers
from ..config import ModelConfig, TrainingConfig


LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
TEXT_LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
_UNFREEZE_AFTER = 0.2  # of the steps


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


def schedule_options(model: ModelConfig, scheduler: SchedulerMixin) -> dict[str, Any]:
    """What the noise schedule of training has other than the base model's; empty where it has the same.

    Raises:
        ValueError: if the mode leaves the UNet as it is, or zero terminal SNR meets a prediction of the noise.
    """
    prediction_type = model.prediction_type or scheduler.config.prediction_type
    options: dict[str, Any] = {}
    if prediction_type != scheduler.config.prediction_type:
        options["prediction_type"] = prediction_type
    if model.rescale_betas_zero_snr and not scheduler.config.get("rescale_betas_zero_snr"):
        # at the last timestep there is nothing but noise then: sampling has to start there (arXiv 2305.08891)
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if options and model.mode == "frozen":
        raise ValueError(
            f"A frozen UNet cannot learn another noise schedule ({', '.join(options)}); choose mode lora or full."
        )
    zero_snr = model.rescale_betas_zero_snr or scheduler.config.get("rescale_betas_zero_snr")
    if options and zero_snr and prediction_type == "epsilon":
        raise ValueError(
            "Where there is nothing but noise, a prediction of the noise says nothing: zero terminal SNR needs"
            " `--prediction_type v_prediction`."
        )
    return options


def with_unfreezing(config: TrainingConfig, schedule: dict[str, Any]) -> TrainingConfig:
    """The configuration with the time of unfreezing chosen, if it leaves that open."""
    if config.model.unfreeze_after is not None:
        return config
    # a frozen UNet cannot predict what it was not taught to
    share = 0.0 if schedule else _UNFREEZE_AFTER
    return replace(config, model=replace(config.model, unfreeze_after=share))


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
