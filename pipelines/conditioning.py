"""A UNet's conditions from captions and geometry, by backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from diffusers_ctx.adapter import lora_detached
from diffusers_ctx.adapter.image_features import UNetFeatures
from diffusers_ctx.adapter.text_encoders import text_encoders_of
from diffusers_ctx.context import embed_captions


class Conditioner(ABC):
    """Makes the UNet's conditions, all except the context tokens, with a pipeline's text encoders.

    `Conditioner.of(pipeline)` is the one for the pipeline's backbone.

    Args:
        pipeline: a [`ComposablePipeline`] or [`ComposableXLPipeline`].
    """

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    @staticmethod
    def of(pipeline: Any) -> Conditioner:
        """The conditioner of a pipeline."""
        is_xl = pipeline.unet.config.addition_embed_type == "text_time"
        return StableDiffusionXLConditioner(pipeline) if is_xl else StableDiffusionConditioner(pipeline)

    @property
    def text_encoders(self) -> dict[str, PreTrainedModel]:
        """The text encoders by component name."""
        return text_encoders_of(self.pipeline.components)

    @abstractmethod
    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """What the text encoders make of captions: tensors with a row for each, on the pipeline's device.

        `"text"` (B, L, D) is the sequence for cross-attention. Gradients flow unless they are switched off.
        """

    @abstractmethod
    def unet_kwargs(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        """UNet keyword arguments other than the context tokens.

        Args:
            encoded: the images' captions, from `encode_captions`.
            geometry: (B, 6), each image's original height and width, top and left of its crop, and height and width,
                in pixels. Not every backbone uses it.
        """

    def caption_kwargs(self, captions: list[str], geometry: torch.Tensor) -> dict[str, Any]:
        """UNet keyword arguments, see `unet_kwargs`, for captions that are not encoded yet."""
        return self.unet_kwargs(self.encode_captions(captions), geometry)

    def unconditional_kwargs(self, latents: torch.Tensor) -> dict[str, Any]:
        """UNet keyword arguments of whole images without a caption, with these latents (B, C, h, w)."""
        return self.caption_kwargs([""] * len(latents), self.full_image_geometry(latents))

    def full_image_geometry(self, latents: torch.Tensor) -> torch.Tensor:
        """The geometry (B, 6) of uncropped images with these latents (B, C, h, w)."""
        size = [side * self.pipeline.vae_scale_factor for side in latents.shape[2:]]
        return torch.tensor([*size, 0, 0, *size]).repeat(len(latents), 1)

    def unet_features(self) -> UNetFeatures:
        """The feature extractor of posteriors with `posterior_encoder="unet"`."""
        return UNetFeatures(self.pipeline.unet, list(self.text_encoders.values()), self.unconditional_kwargs)

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


class StableDiffusionConditioner(Conditioner):
    """Of Stable Diffusion 1 and 2: the text alone."""

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline._execution_device
        text, _ = self.pipeline.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)
        return {"text": text}

    def unet_kwargs(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoded["text"]}


class StableDiffusionXLConditioner(Conditioner):
    """Of Stable Diffusion XL: the text, its pooled embedding, and the geometry."""

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline._execution_device
        text, _, pooled, _ = self.pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # as guidance does for no prompt
            is_given = torch.tensor([bool(caption) for caption in captions], dtype=text.dtype, device=device)
            text, pooled = text * is_given[:, None, None], pooled * is_given[:, None]
        return {"text": text, "pooled": pooled}

    def unet_kwargs(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        text = encoded["text"]
        added = {"text_embeds": encoded["pooled"], "time_ids": geometry.to(text)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
