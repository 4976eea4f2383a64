"""What a family of backbones says of itself: the rest of the library asks, and is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...adapter_format import INJECTIONS, Injection
from ...context import ContextModule
from ..text_encoders import text_encoders_of, tokenizer_of
from .noising import Noising


@dataclass
class AttachedAdapter:
    """State of the adapter on a model, kept with the model because several pipelines may share it (`from_pipe`).

    Attributes:
        plain_scheduler: the pipeline's scheduler without the adapter, if the adapter has its own noise schedule.
        prediction_type: what the model predicts with the adapter, in that case.
        trained_full: whether the whole model was trained together with the adapter.
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
    """Holds the context module within the model, which takes it along to its device, data type and checkpoints.

    Attributes:
        guard: the hook that gives the model's calls their tokens.
        is_on: whether tokens that lengthen the text do so.
    """

    guard: RemovableHandle

    def __init__(self, context_module: ContextModule):
        super().__init__()
        self.context_module = context_module
        self.adapter = AttachedAdapter()
        self.is_on = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens  # which need no projection


class Backbone(ABC):
    """A model that denoises, seen as one of its family.

    [`backbone_of`] makes it of a model. It has no state: all is kept in the model.

    Attributes:
        model_class: the family's class in diffusers.
        component: the model's name among a pipeline's components, and of its features among a posterior's inputs.
        name: what messages call it.
        attention_kwargs: the argument of pipelines' `__call__` that weighs LoRAs.
        injections: how tokens can enter; the first is the default.
        lora_targets: the layers that a LoRA is learned for.
        lora_text_encoders: components that can learn a LoRA, too.
        noising: how images are noised, and what the model predicts.
        is_told_size: whether the model is told the size of images.
    """

    model_class: ClassVar[type[ModelMixin]]
    component: ClassVar[Literal["unet", "transformer"]]
    name: ClassVar[str]
    attention_kwargs: ClassVar[str]
    injections: ClassVar[tuple[Injection, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    lora_text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    noising: ClassVar[type[Noising]]
    is_told_size: ClassVar[bool] = False

    def __init__(self, model: Any):
        self.model = model

    @classmethod
    def is_of(cls, model: Any) -> bool:
        """Whether a model is of this family."""
        return isinstance(model, cls.model_class)

    @property
    @abstractmethod
    def token_dim(self) -> int:
        """Width of the tokens that the model attends to, and of its text."""

    @property
    def patch_size(self) -> int:
        """Sides of latents are multiples of it."""
        return 1

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that the model takes."""
        return self.model.config.in_channels

    @property
    def sample_size(self) -> int | list[int] | None:
        """Sides of the latents that the model is made for, if its configuration says."""
        return self.model.config.sample_size

    @abstractmethod
    def check_pipeline(self, pipeline: Any) -> None:
        """Checks that a pipeline is of the model's family.

        Raises:
            ValueError: if it is not.
        """

    @property
    @abstractmethod
    def first_weight(self) -> torch.Tensor:
        """A weight that says device and data type of what the model is given."""

    @abstractmethod
    def requirements(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        """What an adapter trained on this model needs to find again in the one that it is loaded on."""

    @abstractmethod
    def predict(self, x: torch.Tensor, timesteps: torch.Tensor | float, conditions: dict[str, Any]) -> torch.Tensor:
        """What the model predicts (B, C, h, w).

        Args:
            x: (B, C, h, w), noisy latents.
            timesteps: what the model is told of their noise, one number or (B,).
            conditions: the other keyword arguments of its call.
        """

    # What it is told

    @abstractmethod
    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the text encoders of a pipeline make of captions, see [`~pipelines.Conditioner.encode_captions`]."""

    @abstractmethod
    def conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the model's call, see [`~pipelines.Conditioner.model_kwargs`]."""

    def caption_limits(self, pipeline: Any) -> dict[str, int]:
        """How many tokens of a caption each text encoder takes, by the name of its component."""
        names = text_encoders_of(pipeline.components)
        return {name: pipeline.components[tokenizer_of(name)].model_max_length for name in names}

    def decisive_limits(self, pipeline: Any) -> dict[str, int]:
        """Of `caption_limits` those that a caption must keep to: what is longer is lost to the model."""
        return self.caption_limits(pipeline)

    # Features, for posteriors

    @property
    def has_features(self) -> bool:
        """Whether there is a block in the middle."""
        return True

    @property
    @abstractmethod
    def feature_block(self) -> nn.Module:
        """The block in the middle, whose output is the model's features.

        Raises:
            ValueError: if there is none.
        """

    @property
    @abstractmethod
    def feature_channels(self) -> int:
        """Channels of that output."""

    @abstractmethod
    def feature_size(self, latent_size: int) -> int:
        """Height and width of that output for latents of this height and width."""

    @abstractmethod
    def feature_map(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        """The block's output for latents, as a map (B, C, h', w')."""

    # How tokens enter

    @property
    @abstractmethod
    def projection(self) -> ContextProjection | None:
        """What holds the context module, even if the attention to its tokens has been replaced since."""

    @abstractmethod
    def check_unoccupied(self) -> None:
        """Checks that no other adapter takes the place of the context's.

        Raises:
            ValueError: if there is one.
        """

    def attach(self, context_module: ContextModule, injection: str | None = None) -> None:
        """Lets the model attend to the tokens of `context_module`, see [`attach_context_module`]."""
        if injection not in (None, *INJECTIONS):
            raise ValueError(f"Unknown injection '{injection}'; choose one of {list(INJECTIONS)}.")
        injection = injection or self.injections[0]
        if injection not in self.injections:
            raise ValueError(
                f"Context tokens cannot enter a {self.name} by '{injection}'; choose one of {list(self.injections)}."
            )
        self.check_unoccupied()
        if self.token_dim != context_module.config.token_dim:
            raise ValueError(
                f"The context module makes tokens of width {context_module.config.token_dim}, the {self.name} takes"
                f" {self.token_dim}."
            )
        if self.first_weight.is_meta and not next(context_module.parameters()).is_meta:
            raise ValueError(
                f"The {self.name}'s weights are put away; call `enable_sequential_cpu_offload()` after loading."
            )
        context_module.to(self.first_weight)  # its device and data type
        self._attach(context_module, injection)

    @abstractmethod
    def _attach(self, context_module: ContextModule, injection: str) -> None:
        """Does it, when all is checked."""

    @abstractmethod
    def detach(self) -> None:
        """Removes the context module and its attention weights, if there are any: what is left is the plain model."""

    @abstractmethod
    def detached(self) -> AbstractContextManager[None]:
        """While it is open, the model is the plain one; afterwards it has its context module again, if it had one."""

    @property
    def injection(self) -> Injection:
        """How the tokens of the attached context module reach the model."""
        return "prompt"

    @property
    def context_module(self) -> ContextModule | None:
        """The context module that the model carries, or `None`.

        Raises:
            RuntimeError: if the attention to its tokens has been replaced since, so that they would be ignored.
        """
        return None if self.projection is None else self.projection.context_module

    @property
    def adapter(self) -> AttachedAdapter:
        """State of the adapter on the model; the defaults if there is none."""
        return AttachedAdapter() if self.projection is None else self.projection.adapter

    @property
    def has_context_module(self) -> bool:
        """Whether the model carries a context module, even if the attention to it has been replaced since."""
        return self.projection is not None

    @abstractmethod
    def with_tokens(self, conditions: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the model's call: those given, with context tokens (B, N, T, token_dim).

        The model takes samples of B rows or, as under guidance, a multiple of it; the tokens are repeated to fit.
        """

    def call_with_tokens(self, arguments: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        """Arguments of a pipeline's `__call__`: those given, with context tokens (B, N, T, token_dim)."""
        return arguments | {"ip_adapter_image_embeds": [tokens]}

    @abstractmethod
    def enter_tokens(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments of a call with tokens, as the model's `forward` takes them: what the hook on calls does.

        Raises:
            ValueError: if there are no tokens, or not for a divisor of the call's rows.
        """

    @property
    def attention_layers(self) -> nn.ModuleDict:
        """The adapter's own weights in the attention layers, by the name of the layer (dots become slashes)."""
        return nn.ModuleDict()

    def check_token_scale(self, scale: float) -> None:
        """Checks that `set_token_scale` can set this scale.

        Raises:
            ValueError: if the scale is negative; or if the tokens are in the prompt and it is neither 0 nor 1.
        """
        if self.injection == "prompt" and scale not in (0, 1):
            raise ValueError(f"Tokens in the prompt have no weight: the scale can be 0 or 1, not {scale}.")
        if not scale >= 0:
            raise ValueError(f"The scale is {scale}; it must be 0 or more.")

    def set_token_scale(self, scale: float) -> None:
        """Scales the attention to context tokens: 1 as trained, 0 the plain model."""
        assert self.projection is not None
        self.projection.is_on = scale == 1

    @property
    def token_scales(self) -> set[float]:
        """The scales that the layers have: one, unless something other than `set_token_scale` has set them."""
        assert self.projection is not None
        return {float(self.projection.is_on)}

    @abstractmethod
    def check_projections(self) -> None:
        """Checks that LoRAs act on the attention layers.

        Raises:
            ValueError: if `fuse_qkv_projections` has copied the weights that they would act on.
        """

    def _refuse_fused(self) -> NoReturn:
        raise ValueError(
            "The adapter's LoRA does not act on fused attention projections; call `unfuse_qkv_projections()` first."
        )


def original_of(model: Any) -> Any:
    """The model itself, where it is compiled."""
    return getattr(model, "_orig_mod", model)


def repeated(tokens: torch.Tensor, rows: int, name: str) -> torch.Tensor:
    """Tokens, repeated to the rows of a call: guidance doubles these, and may begin or end while images are made.

    Raises:
        ValueError: if the call has no multiple of their rows.
    """
    if rows % len(tokens):
        raise ValueError(
            f"There are context tokens for {len(tokens)} images, and the {name} is given {rows} samples; pass the"
            " tokens of each image once."
        )
    return tokens if len(tokens) == rows else tokens.repeat(rows // len(tokens), 1, 1, 1)
