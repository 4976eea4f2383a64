"""Transformers in which text and image attend to each other in every block.

Context tokens are appended to the text. They pass through the pipeline as those of an image prompt do, in
`joint_attention_kwargs`, and a hook moves them before the transformer sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from ...context import ContextModule
from ..offloading import move_to
from .base import Backbone, ContextProjection, original_of, repeated


_TOKENS = "ip_adapter_image_embeds"  # what a pipeline calls an image prompt in `joint_attention_kwargs`
_PROJECTION = "context_projection"  # the submodule of ours


class JointTransformerBackbone(Backbone):
    """A multimodal diffusion transformer.

    Attributes:
        pipeline_name: the pipeline of ours, for messages.
        parameters: names of the arguments of the transformer's `forward`, in order.
        image_prompt: the submodule in which diffusers keeps an IP-Adapter.
        t5: the text encoder that takes long captions.
        t5_limit: how many tokens of a caption it takes: the default of the pipeline's `max_sequence_length`.
    """

    component = "transformer"
    name = "transformer"
    attention_kwargs = "joint_attention_kwargs"
    injections = ("prompt",)
    lora_targets = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
    pipeline_name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    image_prompt: ClassVar[str]
    t5: ClassVar[str]
    t5_limit: ClassVar[int]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.parameters = tuple(inspect.signature(cls.model_class.forward).parameters)[1:]  # without `self`

    @property
    def token_dim(self) -> int:
        return self.model.config.joint_attention_dim

    def conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoded["text"], "pooled_projections": encoded["pooled"]}

    def caption_limits(self, pipeline: Any) -> dict[str, int]:
        limits = super().caption_limits(pipeline)
        return limits | ({self.t5: self.t5_limit} if self.t5 in limits else {})

    def decisive_limits(self, pipeline: Any) -> dict[str, int]:
        limits = self.caption_limits(pipeline)  # T5 takes what CLIP cuts off
        return {name: limit for name, limit in limits.items() if name == self.t5} or limits

    @property
    def feature_block(self) -> nn.Module:
        blocks = self.blocks
        return blocks[len(blocks) // 2]

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks in order, each of which returns the text and the patches of the image."""
        return list(self.model.transformer_blocks)

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
        if getattr(self.model, self.image_prompt, None) is not None:
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

    def call_with_tokens(self, arguments: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        return self.with_tokens(arguments, tokens)

    def enter_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return self._append_tokens(original_of(self.model), args, kwargs) or (args, kwargs)

    def _place(self, projection: ContextProjection) -> None:
        original = original_of(self.model)
        setattr(original, _PROJECTION, projection)
        projection.guard = original.register_forward_pre_hook(self._append_tokens, with_kwargs=True)

    @classmethod
    def _append_tokens(
        cls, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Moves context tokens behind the text, with a row for each row of a call.

        Fails early, with a fix, when a plain pipeline runs a transformer that carries an adapter.
        """
        projection = getattr(transformer, _PROJECTION, None)
        if projection is None:
            return None
        kwargs = dict(zip(cls.parameters, args)) | kwargs
        attention = kwargs.get(cls.attention_kwargs) or {}
        if _TOKENS not in attention:
            raise ValueError(
                "This transformer has a context adapter, and the pipeline passes no context tokens; use"
                f" `{cls.pipeline_name}`, or call `unload_context_adapter()` first."
            )
        tokens = repeated(attention[_TOKENS][0], len(kwargs["encoder_hidden_states"]), cls.name).flatten(1, 2)
        kwargs[cls.attention_kwargs] = {name: value for name, value in attention.items() if name != _TOKENS}
        kwargs |= cls._longer_text(kwargs, tokens) if projection.is_on else {}
        return args[len(cls.parameters) :], kwargs  # arguments too many, which `forward` refuses

    @classmethod
    def _longer_text(cls, kwargs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        """Arguments of a call in which tokens (B, T, token_dim) follow the text."""
        text = kwargs["encoder_hidden_states"]
        return {"encoder_hidden_states": torch.cat([text, tokens.to(text)], dim=1)}
