"""Images to latents and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from PIL import ImageOps
from PIL.Image import Image, Resampling


def to_pixels(image: PipelineImageInput, image_processor: VaeImageProcessor, resolution: int) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of one image or several.

    PIL images are resized and cropped to `resolution`, as in training; arrays and tensors keep their size.
    """

    def fit(entry: Any) -> Any:
        if isinstance(entry, np.ndarray) and np.issubdtype(entry.dtype, np.integer):
            return entry.astype(np.float32) / 255
        if isinstance(entry, torch.Tensor) and not entry.is_floating_point():
            return entry.float() / 255
        if not isinstance(entry, Image):
            return entry
        return ImageOps.fit(ImageOps.exif_transpose(entry).convert("RGB"), (resolution,) * 2, Resampling.LANCZOS)

    return image_processor.preprocess([fit(entry) for entry in image] if isinstance(image, list) else fit(image))


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Scaled latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]: means of the VAE's posterior, in its dtype."""
    dtype = vae.dtype
    with upcast_if_overflowing(vae):
        encoded = vae.encode(pixels.to(device=device, dtype=vae.dtype))
    return (retrieve_latents(encoded, sample_mode="argmax") * vae.config.scaling_factor).to(dtype)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w)."""
    with upcast_if_overflowing(vae), torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample


@contextmanager
def upcast_if_overflowing(vae: AutoencoderKL) -> Iterator[None]:
    """While it is open, a VAE that overflows in half precision is in single precision."""
    dtype = vae.dtype
    overflows = dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(dtype)
