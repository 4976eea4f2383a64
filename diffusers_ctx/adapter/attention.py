"""How context tokens enter a UNet: next to the text, through diffusers' own path for image prompts.

Tokens pass as `added_cond_kwargs["image_embeds"]` through `unet.encoder_hid_proj`. With the injection
`cross_attention`, IP-Adapter processors attend to them with keys and values of their own; with `prompt` they are
appended to the text and share its keys and values. The context module is a submodule of `encoder_hid_proj`: it follows
the UNet to its device, its data type and its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..adapter_format import INJECTIONS, Injection
from ..context import ContextModule
from .offloading import move_to


_CROSS_ATTENTION = "attn2.processor"
_ADDED_CONDITIONS = 7  # position of `added_cond_kwargs` among the arguments of the UNet's `forward`
# plain processors, and those that compute the same attention plus one to the context tokens
_CONTEXT_PROCESSORS = {
    AttnProcessor: IPAdapterAttnProcessor,
    AttnProcessor2_0: IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor: IPAdapterXFormersAttnProcessor,
}
_PLAIN_PROCESSORS = {context: plain for plain, context in _CONTEXT_PROCESSORS.items()}


@dataclass
class AttachedAdapter:
    """State of the adapter on a UNet, kept with the UNet because several pipelines may share it (`from_pipe`).

    Attributes:
        plain_scheduler: the pipeline's scheduler without the adapter, if the adapter has its own noise schedule.
        prediction_type: what the UNet predicts with the adapter, in that case.
        trained_full: whether the whole UNet was trained together with the adapter.
        lora_models: names of the components that the adapter came with LoRAs for.
        scale: the adapter's scale: 1 as trained, 0 the plain model.
        call_scale: what multiplies it in the call that is running.
        clip_features: the CLIP image encoder that was loaded for its posterior.
    """

    plain_scheduler: Any = None
    prediction_type: str | None = None
    trained_full: bool = False
    lora_models: frozenset[str] = frozenset()
    scale: float = 1.0
    call_scale: float = 1.0
    clip_features: Any = None


class ContextProjection(nn.Module):
    """Holds the context module where the UNet expects an image projection; its tokens need no projection."""

    guard: RemovableHandle

    def __init__(self, context_module: ContextModule):
        super().__init__()
        self.context_module = context_module
        self.adapter = AttachedAdapter()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


class PromptProjection(ContextProjection):
    """The same for tokens that lengthen the text (B, L, D), as image prompts do in Kandinsky 2.1."""

    def __init__(self, context_module: ContextModule):
        super().__init__(context_module)
        self.is_on = True

    def forward(self, text: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return torch.cat([text, tokens[0].flatten(1, 2).to(text)], dim=1) if self.is_on else text


def attach_context_module(
    unet: UNet2DConditionModel, context_module: ContextModule, injection: str = "cross_attention"
) -> None:
    """Lets the cross-attention of `unet` attend to the tokens of `context_module`.

    Args:
        unet: the UNet.
        context_module: the module.
        injection: `"cross_attention"` gives every such layer keys and values for the tokens. Values start at zero: a
            fresh adapter changes nothing. `"prompt"` puts the tokens behind those of the text and adds no weights.

    Raises:
        ValueError: if the injection is unknown, the UNet already has a context adapter or an IP-Adapter, its
            cross-attention has another width, or `enable_sequential_cpu_offload` has put its weights away.
    """
    if injection not in INJECTIONS:
        raise ValueError(f"Unknown injection '{injection}'; choose one of {list(INJECTIONS)}.")
    check_unoccupied(unet)
    if unet.config.cross_attention_dim != context_module.config.token_dim:
        raise ValueError(
            f"The context module makes tokens of width {context_module.config.token_dim}, the UNet takes"
            f" {unet.config.cross_attention_dim}."
        )
    if unet.conv_in.weight.is_meta and not next(context_module.parameters()).is_meta:
        raise ValueError("The UNet's weights are put away; call `enable_sequential_cpu_offload()` after loading.")
    context_module.to(unet.conv_in.weight)  # its device and data type
    if injection == "prompt":
        _place_projection(unet, PromptProjection(context_module), "text_image_proj")
        return
    processors = {
        name: _context_processor(unet, name, processor, context_module) if _is_cross_attention(name) else processor
        for name, processor in unet.attn_processors.items()
    }
    if fused_from := getattr(unet, "original_attn_processors", None):  # `unfuse_qkv_projections` sets these
        ours = {name: processor for name, processor in processors.items() if _is_cross_attention(name)}
        unet.original_attn_processors = fused_from | ours
    unet.set_attn_processor(processors)
    _place_projection(unet, MultiIPAdapterImageProjection([ContextProjection(context_module)]), "ip_image_proj")


def check_unoccupied(unet: UNet2DConditionModel) -> None:
    """Checks that no other adapter takes the place of image prompts.

    Raises:
        ValueError: if there is one.
    """
    if has_context_module(unet):
        raise ValueError("The UNet already has a context adapter; call `unload_context_adapter()` first.")
    if unet.encoder_hid_proj is not None:
        raise ValueError("The UNet already has an IP-Adapter; call `unload_ip_adapter()` first.")


def detach_context_module(unet: UNet2DConditionModel) -> None:
    """Removes the context module and its attention weights, if there are any: `unet` is then the plain model."""
    if not has_context_module(unet):
        return
    unet.set_attn_processor(_plain_processors(unet.attn_processors))
    if getattr(unet, "original_attn_processors", None) is not None:  # `unfuse_qkv_projections` would bring ours back
        unet.original_attn_processors = _plain_processors(unet.original_attn_processors)
    _projections(unet)[0].guard.remove()
    unet.encoder_hid_proj = None
    unet.config.encoder_hid_dim_type = None


@contextmanager
def context_module_detached(unet: UNet2DConditionModel) -> Iterator[None]:
    """While it is open, `unet` is the plain model; afterwards it carries its context module again, if it had one."""
    processors, projection = unet.attn_processors, unet.encoder_hid_proj
    kind = unet.config.encoder_hid_dim_type
    attached, fused_from = has_context_module(unet), getattr(unet, "original_attn_processors", None)
    detach_context_module(unet)
    try:
        yield
    finally:
        if attached:
            unet.set_attn_processor(dict(processors))
            if fused_from:
                unet.original_attn_processors = fused_from
            _place_projection(unet, projection, kind)
            for part in (projection, *_context_processors(unet)):
                move_to(part, unet.conv_in.weight.device)


def has_context_module(unet: UNet2DConditionModel) -> bool:
    """Whether `unet` carries a context module, even if its attention processors have been replaced since."""
    return bool(_projections(unet))


def attached_context_module(unet: UNet2DConditionModel) -> ContextModule | None:
    """The context module that `unet` carries, or `None`.

    Raises:
        RuntimeError: if its attention processors have been replaced since, so that its tokens would be ignored.
    """
    projections = _projections(unet)
    if not projections:
        return None
    if injection_of(unet) == "cross_attention" and not all(
        type(processor) in _PLAIN_PROCESSORS for processor in _cross_attention_processors(unet).values()
    ):
        raise RuntimeError(
            "The context adapter's attention processors were replaced (`set_attn_processor`, attention slicing and"
            " `fuse_qkv_projections` do that); undo it with `unfuse_qkv_projections()` if it was the latter, or call"
            " `unload_context_adapter()` and `load_context_adapter(...)` again."
        )
    return projections[0].context_module


def attached_adapter(unet: UNet2DConditionModel) -> AttachedAdapter:
    """State of the adapter on `unet`; the defaults if there is none."""
    projections = _projections(unet)
    return projections[0].adapter if projections else AttachedAdapter()


def add_context_tokens(conditions: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of the UNet's call: those given, and context tokens (B, N, T, token_dim).

    The UNet takes samples of B rows or, as under guidance, a multiple of it; the tokens are repeated to fit.
    """
    return conditions | {"added_cond_kwargs": conditions.get("added_cond_kwargs", {}) | {"image_embeds": [tokens]}}


def context_attention_layers(unet: UNet2DConditionModel) -> nn.ModuleDict:
    """The adapter's own weights in the attention layers, by the name of the layer (dots become slashes)."""
    if injection_of(unet) == "prompt":
        return nn.ModuleDict()
    return nn.ModuleDict(
        {
            name.removesuffix("." + _CROSS_ATTENTION).replace(".", "/"): nn.ModuleDict(
                {"key": processor.to_k_ip[0], "value": processor.to_v_ip[0]}
            )
            for name, processor in _cross_attention_processors(unet).items()
        }
    )


def check_token_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Checks that `set_token_scale` can set this scale.

    Raises:
        ValueError: if the scale is negative; or if the tokens are in the prompt and it is neither 0 nor 1.
    """
    if injection_of(unet) == "prompt" and scale not in (0, 1):
        raise ValueError(f"Tokens in the prompt have no weight: the scale can be 0 or 1, not {scale}.")
    if not scale >= 0:
        raise ValueError(f"The scale is {scale}; it must be 0 or more.")


def set_token_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Scales the attention to context tokens: 1 as trained, 0 the plain model."""
    if injection_of(unet) == "prompt":
        unet.encoder_hid_proj.is_on = scale == 1
        return
    for processor in _cross_attention_processors(unet).values():
        processor.scale = [float(scale)]


def token_scales(unet: UNet2DConditionModel) -> set[float]:
    """The scales that the layers have: one, unless something other than `set_token_scale` has set them."""
    if injection_of(unet) == "prompt":
        return {float(unet.encoder_hid_proj.is_on)}
    return {float(processor.scale[0]) for processor in _cross_attention_processors(unet).values()}


def check_projections(unet: UNet2DConditionModel) -> None:
    """Checks that LoRAs act on the attention layers.

    Raises:
        ValueError: if `fuse_qkv_projections` has copied the weights that they would act on.
    """
    if any(isinstance(processor, FusedAttnProcessor2_0) for processor in unet.attn_processors.values()):
        raise ValueError(
            "The adapter's LoRA does not act on fused attention projections; call `unfuse_qkv_projections()` first."
        )


def injection_of(unet: UNet2DConditionModel) -> Injection:
    """How the tokens of the attached context module reach the UNet."""
    return "prompt" if isinstance(unet.encoder_hid_proj, PromptProjection) else "cross_attention"


def _place_projection(unet: UNet2DConditionModel, projection: nn.Module, kind: str) -> None:
    unet.encoder_hid_proj = projection
    unet.config.encoder_hid_dim_type = kind
    _projections(unet)[0].guard = unet.register_forward_pre_hook(_fit_tokens, with_kwargs=True)


def _fit_tokens(unet: UNet2DConditionModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Repeats the tokens to the rows of a call: guidance doubles these, and may begin or end while images are made.

    Fails early, with a fix, when a plain pipeline runs a UNet that carries an adapter.
    """
    is_positional = len(args) > _ADDED_CONDITIONS
    added = (args[_ADDED_CONDITIONS] if is_positional else kwargs.get("added_cond_kwargs")) or {}
    if not has_context_module(unet):
        return None
    if "image_embeds" not in added:
        raise ValueError(
            "This UNet has a context adapter, and the pipeline passes no context tokens; use `ComposablePipeline` or"
            " its relative for the task, such as `ComposableImg2ImgPipeline.from_pipe(pipe)`, or call"
            " `unload_context_adapter()` first."
        )
    tokens, rows = added["image_embeds"][0], len(args[0] if args else kwargs["sample"])
    if len(tokens) == rows:
        return None
    if rows % len(tokens):
        raise ValueError(
            f"There are context tokens for {len(tokens)} images, and the UNet is given {rows} samples; pass the tokens"
            " of each image once."
        )
    added = added | {"image_embeds": [tokens.repeat(rows // len(tokens), 1, 1, 1)]}
    if is_positional:
        return (*args[:_ADDED_CONDITIONS], added, *args[_ADDED_CONDITIONS + 1 :]), kwargs
    return args, kwargs | {"added_cond_kwargs": added}


def _projections(unet: UNet2DConditionModel) -> list[ContextProjection]:
    projection = getattr(unet, "encoder_hid_proj", None)
    layers = getattr(projection, "image_projection_layers", [projection])
    return [layer for layer in layers if isinstance(layer, ContextProjection)]


def _is_cross_attention(name: str) -> bool:
    return name.endswith(_CROSS_ATTENTION)


def _cross_attention_processors(unet: UNet2DConditionModel) -> dict[str, Any]:
    return {name: processor for name, processor in unet.attn_processors.items() if _is_cross_attention(name)}


def _context_processors(unet: UNet2DConditionModel) -> list[nn.Module]:
    return [processor for processor in unet.attn_processors.values() if type(processor) in _PLAIN_PROCESSORS]


def _context_processor(
    unet: UNet2DConditionModel, name: str, processor: object, context_module: ContextModule
) -> nn.Module:
    attention = unet.get_submodule(name.removesuffix(".processor"))
    kind = _CONTEXT_PROCESSORS.get(type(processor), IPAdapterAttnProcessor2_0)
    nodes, tokens, token_dim = context_module.tokens_shape
    created = kind(hidden_size=attention.inner_dim, cross_attention_dim=token_dim, num_tokens=(nodes * tokens,))
    nn.init.zeros_(created.to_v_ip[0].weight)
    return created.to(device=unet.device, dtype=unet.dtype)


def _plain_processors(processors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _PLAIN_PROCESSORS[type(processor)]() if type(processor) in _PLAIN_PROCESSORS else processor
        for name, processor in processors.items()
    }
