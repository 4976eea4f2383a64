"""Images to latents and back: one crop, one encoding and one decoding for pipelines, training and evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL.Image import Image

from .data.decoding import conversions, square_crop, warn_of_conversions


_NUMBERS = "biuf"  # kinds of data types of arrays
_ROUNDING = 1e-2  # of values in half precision, and of those that resampling leaves beyond white


def latent_size(vae: AutoencoderKL, resolution: int) -> int:
    """Height and width of the latents of images whose height and width is `resolution`, in pixels."""
    return resolution // 2 ** (len(vae.config.block_out_channels) - 1)


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as a sequence of patches of 2x2 (B, h w / 4, 4 C), as FLUX.1 takes them."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack_latents(packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undoes `pack_latents`: latents (B, C, height, width)."""
    return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def to_pixels(image: PipelineImageInput, image_processor: VaeImageProcessor, resolution: int) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of one image or several.

    PIL images are resized and cropped to `resolution`, as in training. Arrays (H, W), (H, W, C) or (B, H, W, C) and
    tensors (H, W), (C, H, W) or (B, C, H, W), of 1 or 3 channels, keep their size. Integers lie in 0 to 255, and
    floating-point values in [0, 1]; as everywhere in diffusers, [-1, 1] is deprecated.

    Raises:
        ValueError: for anything else, for images of different kinds or sizes, or for none.
    """
    entries = list(image) if isinstance(image, list | tuple) else [image]
    if entries and all(isinstance(entry, Image) for entry in entries):
        warn_of_conversions((kind for entry in entries for kind in conversions(entry)), stacklevel=3)
        return image_processor.preprocess([square_crop(entry, resolution) for entry in entries])
    batches = [_as_batch(entry) for entry in entries]
    shapes = {batch.shape[1:] for batch in batches}
    if len(shapes) != 1:
        raise ValueError(f"`image` holds images of {len(shapes)} sizes; give at least one, and all of one size.")
    return image_processor.preprocess(np.concatenate(batches))


def _as_batch(entry: Any) -> np.ndarray:
    """An array or a tensor as images (B, H, W, 3) with values in [0, 1]."""
    if isinstance(entry, torch.Tensor):
        tensor = entry.detach().cpu()
        array = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        channels, layout = -3, "tensors are (H, W), (C, H, W) or (B, C, H, W)"
    elif isinstance(entry, np.ndarray):
        array, channels, layout = entry, -1, "arrays are (H, W), (H, W, C) or (B, H, W, C)"
    else:
        kind = type(entry).__name__
        raise ValueError(f"`image` holds a {kind}; give PIL images alone, or arrays or tensors of one size.")
    if array.ndim == 2:
        array = np.expand_dims(array, channels)
    is_image = array.ndim in (3, 4) and array.size and array.shape[channels] in (1, 3)
    if not is_image or array.dtype.kind not in _NUMBERS:
        raise ValueError(
            f"`image` has the shape {tuple(entry.shape)} of {entry.dtype}; {layout}, with 1 or 3 channels."
        )
    array = array[None] if array.ndim == 3 else array
    array = _in_unit_range(np.moveaxis(array, channels, -1))
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def _in_unit_range(array: np.ndarray) -> np.ndarray:
    """Values as floats, integers from 0 to 255 divided by 255."""
    is_integer = np.issubdtype(array.dtype, np.integer)
    low, high = array.min(), array.max()
    fits = (0 <= low and high <= 255) if is_integer else (-1 - _ROUNDING <= low and high <= 1 + _ROUNDING)
    if not fits:  # nor do those that are not finite
        raise ValueError(
            f"`image` has values from {low} to {high}; integers lie in 0 to 255, and floating-point values in [0, 1]."
        )
    if is_integer:
        return array.astype(np.float32) / 255
    array = array.astype(np.float32)
    if low < -_ROUNDING:
        warnings.warn("Images in [-1, 1] are deprecated, as in diffusers; give [0, 1].", FutureWarning, stacklevel=4)
        array = (array + 1) / 2
    return array.clip(0, 1)  # diffusers would take a batch with one value just below 0 for [-1, 1]


@torch.no_grad()
def encode_pixels(
    vae: AutoencoderKL, pixels: torch.Tensor, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations (B, C, h, w) of the centred and scaled latents of pixels (B, 3, H, W) in [-1, 1].

    Args:
        vae: the autoencoder; the results have its dtype.
        pixels: the images.
        device: where the autoencoder computes, if offloading keeps its weights elsewhere.
    """
    dtype, scale, shift = vae.dtype, vae.config.scaling_factor, _shift(vae)
    with _in_range(vae):
        encoded = vae.encode(pixels.to(device or vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:  # an autoencoder without a posterior, such as `AutoencoderTiny`
        mean, std = encoded.latents, torch.zeros_like(encoded.latents)
    return ((mean - shift) * scale).to(dtype), (std * scale).to(dtype)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), about in [-1, 1], of latents (B, C, h, w) as `encode_pixels` makes them.

    They are decoded in a precision that the VAE can take.
    """
    with _in_range(vae), torch.autocast(latents.device.type, enabled=False):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + _shift(vae)).sample


def _shift(vae: AutoencoderKL) -> float:
    """What latents are centred by before they are scaled; 0 but for autoencoders of newer models."""
    return vae.config.get("shift_factor") or 0.0


@contextmanager
def _in_range(vae: AutoencoderKL) -> Iterator[None]:
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
