"""Kernel distance between sets of feature vectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subset_size: int = 1000, num_subsets: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of feature vectors, estimated without bias; lower is better.

    The kernel is `k(x, y) = (x·y / d + 1)³`, the estimate is the mean over random subsets of each set. With features
    of the Inception network it is the Kernel Inception Distance (Bińkowski et al., 2018, arXiv 1801.01401);
    any other features do, and distances on different features cannot be compared. Unlike the Fréchet and the sliced
    Wasserstein distance, its expectation does not depend on the number of images. The expectation is at least 0, has
    no upper bound, and is 0 for two samples of the same distribution; single estimates may be negative.

    Args:
        a: features (n, d).
        b: features (m, d).
        subset_size: vectors drawn from each set, without replacement, for one estimate.
        num_subsets: number of estimates.
        seed: seed of the subsets.

    Returns:
        the mean of the estimates, and its standard error over the subsets. As subsets share vectors, this error says
        whether `num_subsets` is enough; it understates how much other images would change the estimate.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if the features are not two matrices of the same width, or if a set is smaller than a subset.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Got features of shape {a.shape} and {b.shape}; give two matrices (n, d) of the same d.")
    if not 2 <= subset_size <= min(len(a), len(b)) or num_subsets < 2:
        raise ValueError(
            f"Cannot take {num_subsets} subsets of {subset_size} from {len(a)} and {len(b)} features; give a "
            f"`subset_size` from 2 to {min(len(a), len(b))} and a `num_subsets` of at least 2, or more features."
        )
    rng = np.random.default_rng(seed)
    estimates = np.array(
        [
            _squared_mmd(*(rng.choice(features, subset_size, replace=False).astype(np.float64) for features in (a, b)))
            for _ in range(num_subsets)
        ]
    )
    return float(estimates.mean()), float(estimates.std(ddof=1) / np.sqrt(num_subsets))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased for two sets of the same size: a vector is not compared with itself."""
    kernel = _polynomial_kernel()  # of degree 3, with gamma 1 / d and an offset of 1 by default
    return _mean_of_pairs(kernel(x, x)) + _mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


def _mean_of_pairs(kernel: np.ndarray) -> float:
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))


def _polynomial_kernel() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    try:
        from sklearn.metrics.pairwise import polynomial_kernel
    except ImportError as error:
        raise ImportError("The kernel distance needs scikit-learn; run `pip install scikit-learn`.") from error
    return polynomial_kernel
