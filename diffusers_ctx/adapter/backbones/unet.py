"""The UNet of Stable Diffusion 1, 2 and XL: tokens enter through diffusers' own path for image prompts.

They pass as `added_cond_kwargs["image_embeds"]` through `unet.encoder_hid_proj`. With the injection `cross_attention`,
IP-Adapter processors attend to them with keys and values of their own; with `prompt` they are appended to the text and
share its keys and values. The context module is a submodule of `encoder_hid_proj`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

from ...adapter_format import Injection
from ...context import ContextModule
from ..offloading import move_to
from .base import Backbone, ContextProjection, repeated
from .noising import Diffusion


_CROSS_ATTENTION = "attn2.processor"
_ADDED_CONDITIONS = 7  # position of `added_cond_kwargs` among the arguments of the UNet's `forward`
# plain processors, and those that compute the same attention plus one to the context tokens
_CONTEXT_PROCESSORS = {
    AttnProcessor: IPAdapterAttnProcessor,
    AttnProcessor2_0: IPAdapterAttnProcessor2_0,
    XFormersAttnProcessor: IPAdapterXFormersAttnProcessor,
}
_PLAIN_PROCESSORS = {context: plain for plain, context in _CONTEXT_PROCESSORS.items()}


class PromptProjection(ContextProjection):
    """For tokens that lengthen the text (B, L, D), as image prompts do in Kandinsky 2.1."""

    def forward(self, text: torch.Tensor, tokens: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return torch.cat([text, tokens[0].flatten(1, 2).to(text)], dim=1) if self.is_on else text


class UNetBackbone(Backbone):
    """A UNet with cross-attention to the text, as in Stable Diffusion 1 and 2."""

    model_class = UNet2DConditionModel
    component = "unet"
    name = "UNet"
    attention_kwargs = "cross_attention_kwargs"
    injections = ("cross_attention", "prompt")
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0")
    noising = Diffusion

    @property
    def token_dim(self) -> int:
        return self.model.config.cross_attention_dim

    @property
    def first_weight(self) -> torch.Tensor:
        return self.model.conv_in.weight

    def check_pipeline(self, pipeline: Any) -> None:
        if hasattr(pipeline, "text_encoder_2"):
            raise ValueError(
                "The checkpoint is not of Stable Diffusion XL; train it with train_context_text_to_image.py."
            )

    def requirements(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "in_channels": self.model.config.in_channels,
            "block_out_channels": list(self.model.config.block_out_channels),
            "cross_attention_dim": self.model.config.cross_attention_dim,
            "addition_embed_type": self.model.config.addition_embed_type,
            "prediction_type": scheduler_config["prediction_type"],
        }

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor | float, conditions: dict[str, Any]) -> torch.Tensor:
        return self.model(x, timesteps, **conditions, return_dict=False)[0]

    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        device = pipeline._execution_device
        text, _ = pipeline.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)
        return {"text": text}

    def conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoded["text"]}

    @property
    def has_features(self) -> bool:
        return self.model.mid_block is not None

    @property
    def feature_block(self) -> nn.Module:
        if self.model.mid_block is None:
            raise ValueError("This UNet has no middle block; use `--posterior_encoder vae` or `clip`.")
        return self.model.mid_block

    @property
    def feature_channels(self) -> int:
        return self.model.config.block_out_channels[-1]

    def feature_size(self, latent_size: int) -> int:
        for _ in self.model.config.block_out_channels[1:]:
            latent_size = -(-latent_size // 2)
        return latent_size

    def feature_map(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return output

    @property
    def projection(self) -> ContextProjection | None:
        return _projection(self.model)

    def check_unoccupied(self) -> None:
        if self.has_context_module:
            raise ValueError("The UNet already has a context adapter; call `unload_context_adapter()` first.")
        if self.model.encoder_hid_proj is not None:
            raise ValueError("The UNet already has an IP-Adapter; call `unload_ip_adapter()` first.")

    def _attach(self, context_module: ContextModule, injection: str) -> None:
        unet = self.model
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

    def detach(self) -> None:
        unet, projection = self.model, self.projection
        if projection is None:
            return
        unet.set_attn_processor(_plain_processors(unet.attn_processors))
        if getattr(unet, "original_attn_processors", None) is not None:  # `unfuse_qkv_projections` would bring ours
            unet.original_attn_processors = _plain_processors(unet.original_attn_processors)
        projection.guard.remove()
        unet.encoder_hid_proj = None
        unet.config.encoder_hid_dim_type = None

    @contextmanager
    def detached(self) -> Iterator[None]:
        unet = self.model
        processors, projection = unet.attn_processors, unet.encoder_hid_proj
        kind = unet.config.encoder_hid_dim_type
        attached, fused_from = self.has_context_module, getattr(unet, "original_attn_processors", None)
        self.detach()
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

    @property
    def injection(self) -> Injection:
        return "prompt" if isinstance(self.model.encoder_hid_proj, PromptProjection) else "cross_attention"

    @property
    def context_module(self) -> ContextModule | None:
        projection = self.projection
        if projection is None:
            return None
        if self.injection == "cross_attention" and not all(
            type(processor) in _PLAIN_PROCESSORS for processor in _cross_attention_processors(self.model).values()
        ):
            raise RuntimeError(
                "The context adapter's attention processors were replaced (`set_attn_processor`, attention slicing and"
                " `fuse_qkv_projections` do that); undo it with `unfuse_qkv_projections()` if it was the latter, or"
                " call `unload_context_adapter()` and `load_context_adapter(...)` again."
            )
        return projection.context_module

    def with_tokens(self, conditions: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        added = conditions.get("added_cond_kwargs") or {}
        return conditions | {"added_cond_kwargs": added | {"image_embeds": [tokens]}}

    def tokens_of_call(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The context tokens (B, N, T, token_dim) among a call's arguments, if there are any."""
        return _added_conditions(args, kwargs).get("image_embeds", [None])[0]

    def enter_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _fit_tokens(self.model, args, kwargs) or (args, kwargs)

    @property
    def attention_layers(self) -> nn.ModuleDict:
        if self.injection == "prompt":
            return nn.ModuleDict()
        return nn.ModuleDict(
            {
                name.removesuffix("." + _CROSS_ATTENTION).replace(".", "/"): nn.ModuleDict(
                    {"key": processor.to_k_ip[0], "value": processor.to_v_ip[0]}
                )
                for name, processor in _cross_attention_processors(self.model).items()
            }
        )

    def set_token_scale(self, scale: float) -> None:
        if self.injection == "prompt":
            super().set_token_scale(scale)
            return
        for processor in _cross_attention_processors(self.model).values():
            processor.scale = [float(scale)]

    @property
    def token_scales(self) -> set[float]:
        if self.injection == "prompt":
            return super().token_scales
        return {float(processor.scale[0]) for processor in _cross_attention_processors(self.model).values()}

    def check_projections(self) -> None:
        if any(isinstance(processor, FusedAttnProcessor2_0) for processor in self.model.attn_processors.values()):
            self._refuse_fused()


def _place_projection(unet: UNet2DConditionModel, projection: nn.Module, kind: str) -> None:
    unet.encoder_hid_proj = projection
    unet.config.encoder_hid_dim_type = kind
    placed = _projection(unet)
    assert placed is not None
    placed.guard = unet.register_forward_pre_hook(_fit_tokens, with_kwargs=True)


def _fit_tokens(unet: UNet2DConditionModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    """Repeats the tokens to the rows of a call.

    Fails early, with a fix, when a plain pipeline runs a UNet that carries an adapter.
    """
    added = _added_conditions(args, kwargs)
    if _projection(unet) is None:
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
    added = added | {"image_embeds": [repeated(tokens, rows, UNetBackbone.name)]}
    if len(args) > _ADDED_CONDITIONS:
        return (*args[:_ADDED_CONDITIONS], added, *args[_ADDED_CONDITIONS + 1 :]), kwargs
    return args, kwargs | {"added_cond_kwargs": added}


def _added_conditions(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    is_positional = len(args) > _ADDED_CONDITIONS
    return (args[_ADDED_CONDITIONS] if is_positional else kwargs.get("added_cond_kwargs")) or {}


def _projection(unet: UNet2DConditionModel) -> ContextProjection | None:
    projection = getattr(unet, "encoder_hid_proj", None)
    layers = getattr(projection, "image_projection_layers", [projection])
    return next((layer for layer in layers if isinstance(layer, ContextProjection)), None)


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
