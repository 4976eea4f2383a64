"""The transformer of Stable Diffusion 3 and 3.5: text and image attend to each other in every block.

Context tokens are appended to the text, which has neither positions nor a mask. They pass through the pipeline as
those of an image prompt do, in `joint_attention_kwargs`, and a hook moves them before the transformer sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0
from torch import nn

from ...context import ContextModule
from ..offloading import move_to
from .base import Backbone, ContextProjection, original_of, repeated
from .noising import RectifiedFlow


_PARAMETERS = tuple(inspect.signature(SD3Transformer2DModel.forward).parameters)[1:]  # without `self`, in order
_TOKENS = "ip_adapter_image_embeds"  # what the pipeline calls an image prompt in `joint_attention_kwargs`
_PROJECTION = "context_projection"  # the submodule of ours
_T5_LIMIT = 256  # tokens of a caption, the default of the pipeline's `max_sequence_length`


class SD3Backbone(Backbone):
    """A multimodal diffusion transformer with the three text encoders of Stable Diffusion 3, or without T5."""

    model_class = SD3Transformer2DModel
    component = "transformer"
    name = "transformer"
    attention_kwargs = "joint_attention_kwargs"
    injections = ("prompt",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    noising = RectifiedFlow

    @property
    def token_dim(self) -> int:
        return self.model.config.joint_attention_dim

    @property
    def patch_size(self) -> int:
        return self.model.config.patch_size

    @property
    def first_weight(self) -> torch.Tensor:
        return self.model.pos_embed.proj.weight

    def check_pipeline(self, pipeline: Any) -> None:
        if not hasattr(pipeline, "text_encoder_3"):
            raise ValueError(
                "The checkpoint is of Stable Diffusion 3; train it with train_context_text_to_image_sd3.py."
            )

    def requirements(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        names = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
        config = self.model.config
        return {
            "architecture": self.model_class.__name__,
            **{name: config[name] for name in names},
            "dual_attention_layers": list(config.dual_attention_layers),
        }

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor | float, conditions: dict[str, Any]) -> torch.Tensor:
        timestep = torch.as_tensor(timesteps, device=x.device).expand(len(x))
        return self.model(hidden_states=x, timestep=timestep, **conditions, return_dict=False)[0]

    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        text, _, pooled, _ = pipeline.encode_prompt(
            captions,
            None,
            None,
            device=pipeline._execution_device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_LIMIT,
        )
        return {"text": text, "pooled": pooled}

    def conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoded["text"], "pooled_projections": encoded["pooled"]}

    def caption_limits(self, pipeline: Any) -> dict[str, int]:
        limits = super().caption_limits(pipeline)
        return limits | ({"text_encoder_3": _T5_LIMIT} if "text_encoder_3" in limits else {})

    def decisive_limits(self, pipeline: Any) -> dict[str, int]:
        limits = self.caption_limits(pipeline)  # T5 takes what CLIP cuts off
        return {name: limit for name, limit in limits.items() if name == "text_encoder_3"} or limits

    @property
    def feature_block(self) -> nn.Module:
        blocks = self.model.transformer_blocks
        return blocks[len(blocks) // 2]

    @property
    def feature_channels(self) -> int:
        return self.model.config.num_attention_heads * self.model.config.attention_head_dim

    def feature_size(self, latent_size: int) -> int:
        return latent_size // self.patch_size

    def feature_map(self, output: tuple[torch.Tensor, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
        _, patches = output  # after the text
        return patches.transpose(1, 2).unflatten(2, [side // self.patch_size for side in latents.shape[2:]])

    @property
    def projection(self) -> ContextProjection | None:
        return getattr(self.model, _PROJECTION, None)

    def check_unoccupied(self) -> None:
        if self.has_context_module:
            raise ValueError("The transformer already has a context adapter; call `unload_context_adapter()` first.")
        if getattr(self.model, "image_proj", None) is not None:
            raise ValueError("The transformer already has an IP-Adapter; call `unload_ip_adapter()` first.")

    def _attach(self, context_module: ContextModule, injection: str) -> None:
        self._place(ContextProjection(context_module))

    def detach(self) -> None:
        if (projection := self.projection) is not None:
            projection.guard.remove()
            delattr(original_of(self.model), _PROJECTION)

    @contextmanager
    def detached(self) -> Iterator[None]:
        projection = self.projection
        self.detach()
        try:
            yield
        finally:
            if projection is not None:
                self._place(projection)
                move_to(projection, self.first_weight.device)

    def with_tokens(self, conditions: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        attention = (conditions.get(self.attention_kwargs) or {}) | {_TOKENS: [tokens]}
        return conditions | {self.attention_kwargs: attention}

    def enter_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return _append_tokens(original_of(self.model), args, kwargs) or (args, kwargs)

    def check_projections(self) -> None:
        if any(isinstance(part, FusedJointAttnProcessor2_0) for part in self.model.attn_processors.values()):
            raise ValueError(
                "The adapter's LoRA does not act on fused attention projections; call `unfuse_qkv_projections()`"
                " first."
            )

    def _place(self, projection: ContextProjection) -> None:
        original = original_of(self.model)
        setattr(original, _PROJECTION, projection)
        projection.guard = original.register_forward_pre_hook(_append_tokens, with_kwargs=True)


def _append_tokens(
    transformer: SD3Transformer2DModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Moves context tokens behind the text, with a row for each row of a call.

    Fails early, with a fix, when a plain pipeline runs a transformer that carries an adapter.
    """
    projection = getattr(transformer, _PROJECTION, None)
    if projection is None:
        return None
    kwargs = dict(zip(_PARAMETERS, args)) | kwargs
    attention = kwargs.get("joint_attention_kwargs") or {}
    if _TOKENS not in attention:
        raise ValueError(
            "This transformer has a context adapter, and the pipeline passes no context tokens; use"
            " `ComposableSD3Pipeline`, or call `unload_context_adapter()` first."
        )
    text = kwargs["encoder_hidden_states"]
    tokens = repeated(attention[_TOKENS][0], len(text), SD3Backbone.name)
    kwargs["joint_attention_kwargs"] = {name: value for name, value in attention.items() if name != _TOKENS}
    if projection.is_on:
        kwargs["encoder_hidden_states"] = torch.cat([text, tokens.flatten(1, 2).to(text)], dim=1)
    return args[len(_PARAMETERS) :], kwargs  # arguments too many, which `forward` refuses
