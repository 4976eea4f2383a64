"""How much generated images vary, relative to real ones."""

from __future__ import annotations

import numpy as np

from .images import check_images, pixel_scale


_CHUNK = 512  # pixels converted to float at once


def diversity(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Spread of each attribute over generated images relative to real ones: the ratio of the standard deviations.

    A measure of ours. At least 0; 1 is right, below 1 the attribute collapses, above 1 it varies too much. It exposes
    a model that sets the requested attributes and collapses all others. NaN, an attribute that could not be read, is
    left out. Periodic attributes, such as angles, have no such spread.

    Args:
        values: attributes (n, A) of generated images, n at least 2.
        reference: attributes (m, A) of real images of the same context, m at least 2.

    Returns:
        the ratios (A,).

    Raises:
        ValueError: if these are not two such matrices, or if an attribute does not vary over the real images.
    """
    if values.ndim != 2 or reference.ndim != 2 or values.shape[1] != reference.shape[1]:
        raise ValueError(
            f"Got attributes of shape {values.shape} and {reference.shape}; give two matrices (n, A) of the same A."
        )
    _check_two(values, reference)
    spread = np.nanstd(reference, axis=0, ddof=1)
    if not (spread > 0).all():
        raise ValueError(
            f"The attributes {np.flatnonzero(~(spread > 0)).tolist()} do not vary over the reference; leave them out."
        )
    return np.nanstd(values, axis=0, ddof=1) / spread


def image_diversity(images: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square distance between two images of the generated set, relative to the real set.

    A measure of ours. At least 0; 1 is right, below 1 the generated images collapse. The mean over all pairs of the
    squared Euclidean distance is twice the sum of the pixels' variances, which takes no pairs to compute. Large areas
    dominate it, so `diversity` of attributes sees more.

    Args:
        images: generated images (n, H, W, C), uint8 or float as in `sliced_wasserstein_distance`, n at least 2.
        reference: real images (m, H, W, C) of the same context, m at least 2.

    Raises:
        ValueError: if these are not such images, or if all real images are the same.
    """
    check_images(images, reference)
    _check_two(images, reference)
    total = _total_variance(reference)
    if total == 0:
        raise ValueError("All images of the reference are the same; give different ones.")
    return float(np.sqrt(_total_variance(images) / total))


def _check_two(generated: np.ndarray, reference: np.ndarray) -> None:
    if min(len(generated), len(reference)) < 2:
        raise ValueError(f"Got {len(generated)} generated and {len(reference)} real ones; a spread takes two of each.")


def _total_variance(images: np.ndarray) -> float:
    flat = images.reshape(len(images), -1)
    chunks = (flat[:, start : start + _CHUNK] for start in range(0, flat.shape[1], _CHUNK))
    return sum(chunk.var(axis=0, ddof=1, dtype=np.float64).sum() for chunk in chunks) / pixel_scale(images) ** 2
