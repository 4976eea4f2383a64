"""Feature maps of a pretrained network, which a posterior can take instead of an image's latents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..fingerprint import fingerprint
from ..paths import local_or_hub, local_path
from .backbones import backbone_of
from .lora_layers import lora_detached


_TIMESTEP = 0  # a clean image
# larger maps are averaged: training stores those of every image, and the posterior ends at 4x4
_LARGEST_SIZE = 8


class ImageFeatures(Protocol):
    """Maps images to feature maps (B, C, h, w).

    Attributes:
        channels: C.
    """

    channels: int

    def size(self, latent_size: int) -> int:
        """Height and width of the maps of images with latents of height and width `latent_size`."""

    def __call__(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The feature maps of images.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            latents: (B, C, h, w), means of the VAE's posterior, scaled.
        """

    def digest(self) -> str:
        """A hash of all that the features depend on, other than pixels and latents."""


class BackboneFeatures:
    """Outputs of the backbone's middle block for clean latents, at the first timestep and without a prompt.

    They are those of the base model, whatever the pipeline has learned or loaded since: context module and LoRAs are
    detached for it.

    Args:
        model: the UNet or the transformer.
        text_encoders: the text encoders.
        conditions: gives the model's keyword arguments for latents without a prompt.

    Raises:
        ValueError: if the model has no middle block.
    """

    def __init__(
        self,
        model: ModelMixin,
        text_encoders: Sequence[PreTrainedModel],
        conditions: Callable[[torch.Tensor], dict[str, Any]],
    ):
        self.model = model
        self.text_encoders = text_encoders
        self.conditions = conditions
        self._backbone = backbone_of(model)
        self._block = self._backbone.feature_block
        self.channels = self._backbone.feature_channels

    def size(self, latent_size: int) -> int:
        return min(self._backbone.feature_size(latent_size), _LARGEST_SIZE)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        made: list[Any] = []
        latents = latents.to(self.model.dtype)
        # a compiled model would run the graph of the trained one
        with self._as_pretrained(), torch.compiler.set_stance("force_eager"):
            handle = self._block.register_forward_hook(lambda module, inputs, output: made.append(output))
            try:
                self._backbone.predict(latents, _TIMESTEP, self.conditions(latents))
            finally:
                handle.remove()
        return _averaged(self._backbone.feature_map(made[0], latents))

    @torch.no_grad()
    def digest(self) -> str:
        with self._as_pretrained():  # their weights: encodings differ in the last bits between devices
            return fingerprint(self.model, *self.text_encoders, _TIMESTEP, _LARGEST_SIZE)

    @contextmanager
    def _as_pretrained(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._backbone.detached())
            for model in (self.model, *self.text_encoders):
                stack.enter_context(lora_detached(model))
            yield


class ClipFeatures:
    """The patch tokens of a CLIP image encoder, as a map. Images are resized to the square that it takes.

    Args:
        model: a `CLIPVisionModel`, with projection or without; it is moved to the device of the pixels.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.channels = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, name_or_path: str, cache_dir: str | os.PathLike | None = None) -> ClipFeatures:
        """Loads the image encoder of a CLIP model.

        Args:
            name_or_path: folder or Hub id.
            cache_dir: where downloads are kept.

        Raises:
            ValueError: if it cannot be loaded, or is no CLIP model.
        """
        fix = (
            "give the folder or Hub id of a CLIP image encoder, as `--posterior_encoder_model` in training and"
            " evaluation, or to `pipe.load_posterior_encoder(...)`"
        )
        try:
            model, info = CLIPVisionModel.from_pretrained(
                local_or_hub(name_or_path),
                cache_dir=local_path(cache_dir) if cache_dir else None,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, RuntimeError) as error:  # not found; weights of other shapes
            raise ValueError(f"The CLIP model '{name_or_path}' cannot be loaded; {fix}. ({error})") from error
        if info["missing_keys"]:
            raise ValueError(f"'{name_or_path}' does not contain the weights of a CLIP image encoder; {fix}.")
        return cls(model.eval().requires_grad_(False))

    def size(self, latent_size: int) -> int:
        return min(self._patches, _LARGEST_SIZE)

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        model, side = self.model.to(pixels.device), self.model.config.image_size
        resized = F.interpolate(pixels.float(), size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (resized.new_tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        tokens = model(pixel_values=((resized / 2 + 0.5 - mean) / std).to(model.dtype)).last_hidden_state
        return _averaged(tokens[:, 1:].transpose(1, 2).unflatten(2, (self._patches, self._patches)))

    def digest(self) -> str:
        return fingerprint(self.model, self.model.config.to_json_string(), _LARGEST_SIZE)

    @property
    def _patches(self) -> int:
        return self.model.config.image_size // self.model.config.patch_size


def _averaged(features: torch.Tensor) -> torch.Tensor:
    """Feature maps (B, C, h, w) in single precision, averaged down to at most the largest size."""
    height, width = (min(side, _LARGEST_SIZE) for side in features.shape[2:])
    return F.adaptive_avg_pool2d(features.float(), (height, width))
