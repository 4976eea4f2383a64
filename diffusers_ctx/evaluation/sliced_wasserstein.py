"""Sliced Wasserstein distance between sets of images."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from .images import check_images, pixel_scale


_CHUNK = 256  # images converted to float at once


def sliced_wasserstein_distance(a: np.ndarray, b: np.ndarray, n_projections: int = 200, seed: int = 0) -> float:
    """Distance between the distributions that two sets of images were drawn from; lower is better.

    The images' pixels, as vectors in R^d with d = H * W * C, are projected on random directions of the unit sphere;
    the distance is the square root of the mean, over the directions, of the squared 2-Wasserstein distance between
    the two sets of projections (Bonneel et al., 2015, "Sliced and Radon Wasserstein Barycenters of Measures"), as
    computed by POT. For pixels in [0, 1] it lies between 0 and about 1: adding s to every pixel moves a set about s.

    It falls with the number of images. Even two samples of one distribution have a positive distance: show this
    *real-vs-real baseline* beside every result, see `debiased`. Compare distances of one seed: 200 other directions
    change a large distance by some 5 %.

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
    squares = _pot().wasserstein_1d(*_projections(a, b, n_projections, seed), p=2)
    return float(np.sqrt(squares.mean()))


def debiased(distance: float, baseline: float) -> float:
    """A distance corrected for the finite number of images: `sqrt(max(0, distance² - baseline²))`.

    At least 0; lower is better. It is 0 where samples are no further from real images than other real images are. In
    expectation, the squared sliced Wasserstein distance of two samples is about that of their distributions plus that
    of two samples of one distribution, hence the squares; the correction is ours. It is as uncertain as the distance
    itself, see [`bootstrap_interval`], and more so near 0, as a distance below the baseline is cut off.

    Args:
        distance: a sliced Wasserstein distance, at least 0.
        baseline: the distance between two sets of real images of the same context, as large as those of `distance`.
    """
    return math.sqrt(max(0.0, distance**2 - baseline**2))


def bootstrap_interval(
    a: np.ndarray,
    b: np.ndarray,
    n_projections: int = 200,
    seed: int = 0,
    resamples: int = 200,
    level: float = 0.95,
) -> tuple[float, float]:
    """Confidence interval of `sliced_wasserstein_distance` of the same arguments, over the draw of the images.

    Percentile bootstrap (Efron and Tibshirani, 1993, chapter 13) of the squared distance `S`, with one correction.
    Both sets are resampled with replacement, whole images, to the squared distances `S*`. Resamples repeat images,
    which raises all `S*` as few images raise the baseline: near it their own quantiles would miss even `S`. So only
    their spread is used, about `S`: with the quantiles `q` of `S* - mean(S*)` the ends are the roots of
    `S + q_lower` and `S + q_upper`, cut at 0.

    The interval is for the expected distance *at these sizes of the sets*, not for the debiased one: show it beside
    the real-vs-real baseline; `debiased` can be applied to either end. Near the baseline it is about twice as wide as
    necessary, since what the repeated images add varies too. It is conditional on the directions.

    Args:
        a: images (n, H, W, C), uint8, which is scaled to [0, 1], or float, which is taken as it is.
        b: images (m, H, W, C); m may differ from n.
        n_projections: number of directions.
        seed: seed of the directions and of the resampling.
        resamples: number of resamples; a few seconds for 200 with n = m = 2,000.
        level: coverage of the interval, between 0 and 1.

    Returns:
        the lower and the upper end, both at least 0.

    Raises:
        ImportError: if POT is not installed.
        ValueError: as `sliced_wasserstein_distance` does, and if `level` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}; it must lie between 0 and 1, such as 0.95.")
    u, v = (np.ascontiguousarray(x.T) for x in _projections(a, b, n_projections, seed))
    coupling = _coupling(len(a), len(b))
    rng = np.random.default_rng(seed)
    resampled = np.array(
        [
            _mean_square(u[:, rng.integers(0, len(a), len(a))], v[:, rng.integers(0, len(b), len(b))], coupling)
            for _ in range(resamples)
        ]
    )
    tails = np.quantile(resampled - resampled.mean(), [(1 - level) / 2, (1 + level) / 2])
    lower, upper = np.sqrt(np.maximum(0, _mean_square(u, v, coupling) + tails))
    return float(lower), float(upper)


def _projections(a: np.ndarray, b: np.ndarray, n_projections: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Projections (n, directions) and (m, directions) on the same directions."""
    check_images(a, b)
    dimension = math.prod(a.shape[1:])
    directions = _pot().sliced.get_random_projections(dimension, n_projections, seed).astype(np.float32)
    return _project(a, directions), _project(b, directions)


def _project(images: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Projections (n, directions) in float64, without a float copy of all images."""
    flat = images.reshape(len(images), -1)
    starts = range(0, len(flat), _CHUNK)
    chunks = (flat[start : start + _CHUNK].astype(np.float32) / pixel_scale(images) for start in starts)
    return np.concatenate([chunk @ directions for chunk in chunks]).astype(np.float64)


def _coupling(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The optimal coupling of n with m sorted numbers: which of the n meets which of the m, and with what mass."""
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # of the quantile functions, times n m
    return (steps - 1) // m, (steps - 1) // n, np.diff(steps, prepend=0) / (n * m)


def _mean_square(u: np.ndarray, v: np.ndarray, coupling: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Squared sliced distance of projections (directions, n) and (directions, m); faster than POT's general one."""
    rows, columns, mass = coupling
    difference = np.sort(u, axis=1)[:, rows] - np.sort(v, axis=1)[:, columns]
    return float((difference**2 @ mass).mean())


def _pot() -> ModuleType:
    try:
        import ot
    except ImportError as error:
        raise ImportError("The sliced Wasserstein distance needs POT; run `pip install POT`.") from error
    return ot
