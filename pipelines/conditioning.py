"""A backbone's conditions other than the context: captions and geometry."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from diffusers_ctx.adapter import backbone_of_pipeline, lora_detached
from diffusers_ctx.adapter.image_features import BackboneFeatures
from diffusers_ctx.adapter.text_encoders import text_encoders_of
from diffusers_ctx.context import embed_captions


def select_rows(value: Any, num_rows: int, rows: slice | torch.Tensor) -> Any:
    """Some rows of all arguments of a call that have one per sample, such as conditions or ControlNet residuals.

    Args:
        value: a tensor, another value, or a dictionary or sequence of them.
        num_rows: the number of samples; what has another length is returned as it is.
        rows: which rows, as a slice or as indices (R,).
    """
    if isinstance(value, dict):
        return {name: select_rows(entry, num_rows, rows) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [select_rows(entry, num_rows, rows) for entry in value]
    is_per_row = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == num_rows
    return value[rows] if is_per_row else value


class Conditioner:
    """Makes the conditions of a pipeline's backbone, all except the context tokens, with its text encoders.

    Args:
        pipeline: a [`ComposablePipeline`] or one of another family.
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self._backbone = backbone_of_pipeline(pipeline)

    @classmethod
    def of(cls, pipeline: Any) -> Conditioner:
        """The conditioner of a pipeline."""
        return cls(pipeline)

    @property
    def text_encoders(self) -> dict[str, PreTrainedModel]:
        """The text encoders by component name."""
        return text_encoders_of(self.pipeline.components)

    @property
    def lora_text_encoders(self) -> dict[str, PreTrainedModel]:
        """Those that can learn a LoRA."""
        return {name: model for name, model in self.text_encoders.items() if name in self._backbone.lora_text_encoders}

    @property
    def caption_limits(self) -> dict[str, int]:
        """How many tokens of a caption each text encoder takes, by component name."""
        return self._backbone.caption_limits(self.pipeline)

    @property
    def decisive_limits(self) -> dict[str, int]:
        """Of `caption_limits` those that a caption must keep to: what is longer is lost to the model."""
        return self._backbone.decisive_limits(self.pipeline)

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the text encoders make of captions: tensors with a row for each, on the pipeline's device.

        `"text"` (B, L, D) is the sequence that the backbone attends to. Gradients flow unless they are switched off.
        """
        return self._backbone.encode_captions(self.pipeline, captions)

    def model_kwargs(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the backbone's call other than the context tokens.

        Args:
            encoded: the images' captions, from `encode_captions`.
            geometry: (B, 6), each image's original height and width, top and left of its crop, and height and width,
                in pixels. Not every backbone uses it.
        """
        return self._backbone.conditions(encoded, geometry)

    def caption_kwargs(self, captions: list[str], geometry: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments, see `model_kwargs`, for captions that are not encoded yet."""
        return self.model_kwargs(self.encode_captions(captions), geometry)

    def unconditional_kwargs(self, latents: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of whole images without a caption, with these latents (B, C, h, w)."""
        return self.caption_kwargs([""] * len(latents), self.full_image_geometry(latents))

    def full_image_geometry(self, latents: torch.Tensor) -> torch.Tensor:
        """The geometry (B, 6) of uncropped images with these latents (B, C, h, w)."""
        size = [side * self.pipeline.vae_scale_factor for side in latents.shape[2:]]
        return torch.tensor([*size, 0, 0, *size]).repeat(len(latents), 1)

    def backbone_features(self) -> BackboneFeatures:
        """The feature extractor of posteriors whose `posterior_encoder` is `"unet"` or `"transformer"`."""
        return BackboneFeatures(self._backbone.model, list(self.text_encoders.values()), self.unconditional_kwargs)

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        """Embeddings (B, D) of captions by the pretrained text encoders, for [`~ContextModule.choose_noise`].

        Raises:
            ValueError: if LoRAs are fused into the text encoders.
        """
        with ExitStack() as stack:
            for text_encoder in self.text_encoders.values():
                stack.enter_context(lora_detached(text_encoder))
            return embed_captions(self.encode_captions(captions)["text"])
