"""What learns: the adapter alone (`frozen`), a LoRA too (`lora`), or the whole UNet (`full`)."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from ..adapter import LORA_ADAPTER, attached_context_module, context_attention_layers


LORA_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


def prepare_mode(unet: UNet2DConditionModel, mode: str, rank: int) -> None:
    """Sets which parameters of a UNet with a context module learn, and adds the LoRA of mode `lora`.

    Of the context module only the read-out goes on learning beside the UNet: what the concepts are was learned before,
    and the UNet's loss would undo the match between posterior and prior.
    """
    unet.requires_grad_(mode == "full")
    if mode == "lora":
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS),
            adapter_name=LORA_ADAPTER,
        )
    # adding a LoRA freezes everything else, so this comes last
    unet.encoder_hid_proj.requires_grad_(False)
    for module in adapter_modules(unet):
        module.requires_grad_(True)


def adapter_modules(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The parts of the adapter that learn together with the UNet."""
    context_module = attached_context_module(unet)
    assert context_module is not None
    return [context_module.read_out, context_attention_layers(unet)]


def split_parameters(unet: UNet2DConditionModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that learn: those of the adapter, and those of the backbone (LoRA or UNet)."""
    adapter = [parameter for module in adapter_modules(unet) for parameter in module.parameters()]
    known = {id(parameter) for parameter in adapter}
    backbone = [parameter for parameter in unet.parameters() if parameter.requires_grad and id(parameter) not in known]
    return adapter, backbone
