"""How far interventions move attributes, including those that they must not move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


Difference = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Spillover:
    """Mean entries of an interference matrix.

    Attributes:
        forbidden: over the attributes that must not move; lower is better, 0 is perfect.
        allowed: over those that may; where it is near 0 the interventions do nothing, and `forbidden` says nothing.
    """

    forbidden: float
    allowed: float


def absolute_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`|a - b|`, the difference of attributes on a line."""
    return np.abs(a - b)


def mean_difference(a: np.ndarray, b: np.ndarray, difference: Difference = absolute_difference) -> np.ndarray:
    """Mean over samples of the difference between each attribute (A,) of `a` (n, A) and `b` (n, A), row by row.

    NaN differences, of attributes that could not be compared, are left out; an attribute without any other is NaN.
    Between two independent samples of one distribution it is Gini's mean difference, the scale of
    `interference_matrix`.

    Args:
        a: attributes (n, A).
        b: attributes (n, A).
        difference: non-negative differences (n, A); attributes with a period, or comparable only in part, need their
            own, such as `quad_attributes.attribute_difference`.

    Raises:
        ValueError: if the two are no arrays of the same shape (n, A) with n at least 1.
    """
    if a.ndim != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"Got attributes of the shapes {a.shape} and {b.shape}; give (n, A) twice, with n at least 1."
        )
    return _mean(difference(a, b), axis=0)


def interference_matrix(
    before: np.ndarray, after: Sequence[np.ndarray], scale: np.ndarray, difference: Difference = absolute_difference
) -> np.ndarray:
    """How far each intervention moves each attribute, relative to the difference of unrelated images.

    Entry `[i, j]` is the mean absolute change of attribute `j` between samples with the same noise without and with
    intervention `i`, divided by the mean absolute difference of `j` between two independent observational samples. It
    is 0 where nothing moves, 1 where the intervention might as well have drawn another image, and above 1 where it
    moves the attribute further than chance would. Errors of reading attributes add to it. Which value is best depends
    on the entry: 0 where the causal graph forbids a change, and elsewhere the entry of the true intervention;
    [`spillover`] averages the two groups. The measure is ours; its unit is Gini's mean difference.

    Args:
        before: attributes (n, A) of the samples without an intervention.
        after: for each of I interventions the attributes (n, A) of the samples with it; the same noise row by row.
        scale: (A,) above 0, `mean_difference` of two independent real observational samples.
        difference: as in `mean_difference`; the one that `scale` was measured with.

    Returns:
        The matrix (I, A). An entry is NaN where no sample could be compared.

    Raises:
        ValueError: if the shapes do not agree, or `scale` is not above 0 everywhere.
    """
    if scale.shape != before.shape[1:] or not (scale > 0).all():
        raise ValueError(f"`scale` is {scale}; give a number above 0 for each of the {before.shape[-1]} attributes.")
    if not len(after):
        raise ValueError("`after` is empty; give the attributes under at least one intervention.")
    return np.stack([mean_difference(before, moved, difference) / scale for moved in after])


def spillover(matrix: np.ndarray, allowed: np.ndarray) -> Spillover:
    """Mean interference with the attributes that an intervention must not move, and with those that it may move.

    A summary of ours of [`interference_matrix`]; both means are at least 0, see [`Spillover`] for the direction.

    With the causal graph, an intervention may move its target and the target's descendants, here for quad:

        allowed = np.array([[f == c or f in quad.descendants(c) for f in quad.FACTORS] for c in quad.CONCEPTS])

    Args:
        matrix: interference (I, A), see `interference_matrix`; NaN entries are left out.
        allowed: (I, A) bool.

    Returns:
        Both means; one without any entry is NaN.

    Raises:
        ValueError: if `allowed` is no bool array of the matrix's shape.
    """
    if allowed.dtype != bool or allowed.shape != matrix.shape:
        raise ValueError(
            f"`allowed` has the shape {allowed.shape} and type {allowed.dtype}; give bool of shape {matrix.shape}."
        )
    return Spillover(float(_mean(matrix[~allowed])), float(_mean(matrix[allowed])))


def _mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of what is not NaN; NaN where there is nothing, without numpy's warning."""
    total, count = np.nansum(values, axis=axis), np.sum(~np.isnan(values), axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)
