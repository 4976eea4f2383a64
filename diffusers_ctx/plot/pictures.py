"""Images of any kind that a figure may be given, as arrays, and axes that show one."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL.Image import Image


def as_pixels(image: Any) -> np.ndarray:
    """An image (H, W, 3) as float in [0, 1].

    Args:
        image: a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4), uint8, or float in [0, 1].

    Raises:
        ValueError: if it is no image.
    """
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image) else image)
    if pixels.dtype == np.uint8:
        pixels = pixels / 255
    if pixels.dtype.kind != "f" or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(
            f"Got an array of shape {pixels.shape} and type {pixels.dtype}; give a PIL image, or an array (H, W, 3) of"
            " uint8 or of floats in [0, 1]."
        )
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels[..., :3].clip(0, 1)


def as_numbers(values: Any) -> np.ndarray:
    """An array of floats, from what NumPy reads or a tensor of any type on any device."""
    is_tensor = hasattr(values, "detach")  # without PyTorch, which takes seconds to import
    return np.asarray(values.detach().float().cpu() if is_tensor else values, dtype=float)


def show(axes: Any, pixels: np.ndarray, **options: Any) -> Any:
    """Shows an image without ticks and frame; enlarged pixels stay sharp."""
    picture = axes.imshow(
        pixels, interpolation="nearest" if max(pixels.shape[:2]) <= 128 else "antialiased", **options
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return picture
