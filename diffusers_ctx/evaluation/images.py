"""Sets of images, as the metrics take them and as they are stored."""

from __future__ import annotations

import numpy as np


def check_images(a: np.ndarray, b: np.ndarray) -> None:
    """Raises a `ValueError` unless both are uint8 or float images (n, H, W, C), n at least 1, of one H, W and C."""
    for images in (a, b):
        if images.ndim != 4 or not len(images) or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
            raise ValueError(
                f"Got an array of shape {images.shape} and type {images.dtype}; give uint8 or float images of shape "
                "(n, H, W, C) with n at least 1."
            )
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"The images have the shapes {a.shape[1:]} and {b.shape[1:]}; resize them to one.")


def pixel_scale(images: np.ndarray) -> int:
    """The divisor that brings pixels to [0, 1]: 255 for uint8; 1 for float, which is taken as it is."""
    return 255 if images.dtype == np.uint8 else 1


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [0, 1], as pipelines return them with `output_type="np"`, rounded to uint8.

    `VaeImageProcessor.numpy_to_pil` rounds in the same way, but makes a list of pictures of the array.
    """
    return np.rint(images * 255).astype(np.uint8)
