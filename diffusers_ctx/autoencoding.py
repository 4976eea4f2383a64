"""Images to latents and back: one crop, one encoding and one decoding for pipelines, training and evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL import ImageOps
from PIL.Image import Image

from .data.decoding import conversions, square_crop, warn_of_conversions


def native_resolution(pipeline: Any) -> int:
    """Height and width of the images that a pipeline's UNet is made for, in pixels.

    Raises:
        ValueError: if its configuration does not say, or they are no squares.
    """
    size = pipeline.unet.config.sample_size
    sides = {size} if isinstance(size, int | None) else set(size)
    if len(sides) != 1 or None in sides:
        raise ValueError(
            f"The base model's UNet has the `sample_size` {size}, which does not say the side of a square; give"
            " `resolution`, in pixels."
        )
    return sides.pop() * pipeline.vae_scale_factor


def to_pixels(image: PipelineImageInput, image_processor: VaeImageProcessor, resolution: int) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of one image or several.

    PIL images are resized and cropped to `resolution`, as in training; arrays and tensors keep their size.
    """

    def fit(entry: Any) -> Any:
        if isinstance(entry, np.ndarray) and np.issubdtype(entry.dtype, np.integer):
            return entry.astype(np.float32) / 255
        if isinstance(entry, torch.Tensor) and not entry.is_floating_point():
            return entry.float() / 255
        return square_crop(ImageOps.exif_transpose(entry), resolution) if isinstance(entry, Image) else entry

    pictures = [entry for entry in (image if isinstance(image, list) else [image]) if isinstance(entry, Image)]
    warn_of_conversions((kind for picture in pictures for kind in conversions(picture)), stacklevel=3)
    return image_processor.preprocess([fit(entry) for entry in image] if isinstance(image, list) else fit(image))


@torch.no_grad()
def encode_pixels(
    vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations (B, C, h, w) of the scaled latents of pixels (B, 3, H, W) in [-1, 1].

    Args:
        vae: the autoencoder; the results have its dtype.
        pixels: the images.
        device: where the autoencoder computes, if offloading keeps its weights elsewhere.
    """
    dtype, scale = vae.dtype, vae.config.scaling_factor
    with in_range(vae):
        encoded = vae.encode(pixels.to(device or vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:  # an autoencoder without a posterior, such as `AutoencoderTiny`
        mean, std = encoded.latents, torch.zeros_like(encoded.latents)
    return (mean * scale).to(dtype), (std * scale).to(dtype)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), about in [-1, 1], of scaled latents (B, C, h, w), in a precision that the VAE can take."""
    with in_range(vae), torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample


@contextmanager
def in_range(vae: AutoencoderKL) -> Iterator[None]:
    """A VAE that overflows in half precision is in single precision within the `with` block."""
    dtype = vae.dtype
    overflows = dtype == torch.float16 and vae.config.force_upcast
    if overflows:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if overflows:
            vae.to(dtype)
