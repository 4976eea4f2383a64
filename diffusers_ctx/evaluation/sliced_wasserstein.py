"""Sliced Wasserstein distance between sets of images."""

from __future__ import annotations

import math

import numpy as np


_CHUNK = 256  # images converted to float at once


def sliced_wasserstein_distance(a: np.ndarray, b: np.ndarray, n_projections: int = 200, seed: int = 0) -> float:
    """How far apart the laws are that two sets of images were drawn from; lower is better.

    The images' pixels, as vectors in R^d with d = H * W * C, are projected on random directions of the unit sphere;
    the distance is the square root of the mean, over the directions, of the squared 2-Wasserstein distance between
    the two sets of projections (Bonneel et al., 2015, "Sliced and Radon Wasserstein Barycenters of Measures"), as
    computed by POT. For pixels in [0, 1] it lies between 0 and about 1: adding s to every pixel moves a set about s.

    It falls with the number of images: two samples of the same law are a *floor* apart, which belongs beside every
    figure; see `debiased`. Compare figures of one seed: 200 directions drawn anew move a large distance by some 5 %.

    Args:
        a: images (n, H, W, C), uint8, which is scaled to [0, 1], or float, which is taken as it is.
        b: images (m, H, W, C); m may differ from n.
        n_projections: number of directions.
        seed: seed of the directions.

    Raises:
        ImportError: if POT is not installed.
        ValueError: if a set is empty, is no array of images of one of these types, or has images of another shape
            than the other set.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "The sliced Wasserstein distance needs POT; install it with `pip install diffusers-ctx[eval]`."
        ) from error

    for images in (a, b):
        if images.ndim != 4 or not len(images) or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
            raise ValueError(
                f"Got an array of shape {images.shape} and type {images.dtype}; give uint8 or float images of shape "
                "(n, H, W, C) with n at least 1."
            )
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"The images have the shapes {a.shape[1:]} and {b.shape[1:]}; resize them to one.")
    dimension = math.prod(a.shape[1:])
    directions = ot.sliced.get_random_projections(dimension, n_projections, seed).astype(np.float32)
    squares = ot.wasserstein_1d(_project(a, directions), _project(b, directions), p=2)
    return float(np.sqrt(squares.mean()))


def debiased(distance: float, floor: float) -> float:
    """A distance without the share that the finite samples contribute: `sqrt(max(0, distance² - floor²))`.

    Args:
        distance: a sliced Wasserstein distance, at least 0.
        floor: the distance between two sets of real images of the same law, as large as those of `distance`.
    """
    return math.sqrt(max(0.0, distance**2 - floor**2))


def _project(images: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Projections (n, directions) in float64, without a float copy of all images."""
    scale = 255 if images.dtype == np.uint8 else 1
    flat = images.reshape(len(images), -1)
    chunks = (flat[start : start + _CHUNK].astype(np.float32) / scale for start in range(0, len(flat), _CHUNK))
    return np.concatenate([chunk @ directions for chunk in chunks]).astype(np.float64)
