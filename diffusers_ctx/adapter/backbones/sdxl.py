"""The UNet of Stable Diffusion XL: it is told a pooled text, too, and the size and crop of images."""

from __future__ import annotations

from typing import Any

import torch

from .unet import UNetBackbone


class XLBackbone(UNetBackbone):
    """A UNet of Stable Diffusion XL: the text, its pooled embedding, and the geometry."""

    is_told_size = True

    @classmethod
    def is_of(cls, model: Any) -> bool:
        return super().is_of(model) and model.config.addition_embed_type == "text_time"

    def check_pipeline(self, pipeline: Any) -> None:
        if not hasattr(pipeline, "text_encoder_2"):
            raise ValueError(
                "The checkpoint is of Stable Diffusion XL; train it with train_context_text_to_image_sdxl.py."
            )

    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        device = pipeline._execution_device
        text, _, pooled, _ = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:  # as guidance does for no prompt
            is_given = torch.tensor([bool(caption) for caption in captions], dtype=text.dtype, device=device)
            text, pooled = text * is_given[:, None, None], pooled * is_given[:, None]
        return {"text": text, "pooled": pooled}

    def conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        text = encoded["text"]
        added = {"text_embeds": encoded["pooled"], "time_ids": geometry.to(text)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
