"""Whether the attributes of samples lie within the interventional distribution, and what composing concepts costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Conformity:
    """Shares in [0, 1] of samples; higher is better.

    Attributes:
        per_attribute: (A,) share of the samples whose attribute lies in its region.
        joint: share of the samples whose attributes all do.
    """

    per_attribute: np.ndarray
    joint: float


def conformity(values: np.ndarray, reference: np.ndarray, level: float = 0.99, tolerance: float = 0.0) -> Conformity:
    """Share of samples whose attributes lie in the central regions of a reference distribution.

    An attribute's region is the interval between the `(1 - level) / 2` and `(1 + level) / 2` quantiles of the
    reference's readable values, widened by `tolerance` at both ends. Without a tolerance, a value that many samples
    share exactly, such as a hue at its limit, is in or out by chance where it is near an end. NaN, an attribute that
    could not be read or is not defined, is an outcome of its own: it conforms only where more than `1 - level` of the
    reference is NaN too (the orientation of quad's circles). Give the attributes that were intervened on, and as
    reference the same attributes of real held-out images under the same interventions, at least `10 / (1 - level)` of
    them. The measure is ours.

    Read it beside the conformity of a second real sample: about `level` for an attribute, and between `level**A`, for
    independent attributes, and `level` jointly. Attributes that were all intervened on are independent, so that the
    product of intervals is the natural region; it has no notion of dependence. The share of samples on the reference's
    k-nearest-neighbour manifold ("precision"; Kynkäänniemi et al., 2019, arXiv 1904.06991) has, but tells less in low
    dimensions, where the balls around outliers are large: of quad's observational samples, 66 % lie on the manifold of
    do(quad1, quad4), and 34 % in its intervals (n = 1,000, k = 3; a second real sample: 98 % each).

    It is one-sided: identical samples can conform. Show it beside a distance between distributions or a diversity.

    Args:
        values: attributes (n, A) of the samples.
        reference: attributes (m, A) of the reference; m may differ from n.
        level: mass of the region, between 0 and 1.
        tolerance: error of reading a value off an image, at least 0.

    Raises:
        ValueError: if an array is empty, the two have other attributes, or `level` or `tolerance` is out of range.
    """
    if values.ndim != 2 or reference.ndim != 2 or values.shape[1:] != reference.shape[1:]:
        raise ValueError(f"Got attributes of the shapes {values.shape} and {reference.shape}; give (n, A) and (m, A).")
    if not values.size or not reference.size:
        raise ValueError(
            f"Got attributes of the shapes {values.shape} and {reference.shape}; give at least one of each."
        )
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}; it lies between 0 and 1.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` is {tolerance}; it must be 0 or more.")
    conforms = np.stack([_in_region(*columns, level, tolerance) for columns in zip(values.T, reference.T)], axis=1)
    return Conformity(conforms.mean(axis=0), float(conforms.all(axis=1).mean()))


def _in_region(values: np.ndarray, reference: np.ndarray, level: float, tolerance: float) -> np.ndarray:
    unreadable = np.isnan(reference)
    conforms = np.isnan(values) & (unreadable.mean() > 1 - level)
    if not unreadable.all():
        low, high = np.quantile(reference[~unreadable], [(1 - level) / 2, (1 + level) / 2])
        conforms |= (low - tolerance <= values) & (values <= high + tolerance)
    return conforms


def composition_gap(single: Sequence[float] | np.ndarray, pair: Sequence[float] | np.ndarray) -> float:
    """What composing costs: the mean error of pairs of interventions less the mean error of single ones.

    A measure of ours, in the unit of the errors. Lower is better: 0 where unseen combinations are met as well as the
    contexts of the training; it may be negative. All errors are of one kind, such as debiased sliced Wasserstein
    distances at the same number of images.

    Args:
        single: an error for each single intervention.
        pair: an error for each pair.

    Raises:
        ValueError: if one of the two is empty.
    """
    if not len(single) or not len(pair):
        raise ValueError(f"Got {len(single)} single errors and {len(pair)} of pairs; give at least one of each.")
    return float(np.mean(pair) - np.mean(single))
