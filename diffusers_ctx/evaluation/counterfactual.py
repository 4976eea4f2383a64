"""Soundness of counterfactual images: Pearl's axioms as measured by Monteiro et al. (2023, arXiv 2303.01274),
minimality, and the distance to the true counterfactual. In all, lower is better and 0 is perfect.

Images are (n, H, W, C), uint8, which is scaled to [0, 1], or float, which is taken as it is. Image i of one set
belongs to image i of the other; their distance is the mean absolute difference of pixels (L1). No axiom suffices
alone: a model that returns each image unchanged satisfies composition, reversibility and minimality, and fails in
effectiveness.
"""

from __future__ import annotations

import numpy as np

from .images import check_images, pixel_scale
from .interference import Difference, absolute_difference, mean_difference


def counterfactual_composition(images: np.ndarray, unchanged: np.ndarray) -> float:
    """Axiom of composition: the counterfactual under an image's own context is the image.

    Not to be confused with the composing of several interventions.

    Args:
        images: images (n, H, W, C).
        unchanged: the counterfactuals of `images` under the context that they have; after m rounds, those of those.

    Returns:
        the mean L1 distance, in [0, 1] for pixels in [0, 1].

    Raises:
        ValueError: if the two are not images of the same number and shape.
    """
    return _distance(images, unchanged)


def counterfactual_reversibility(images: np.ndarray, returned: np.ndarray) -> float:
    """Axiom of reversibility: the way to another context and back leads to the image.

    Args:
        images: images (n, H, W, C).
        returned: of the counterfactuals of `images`, the counterfactuals under the context that `images` have; after m
            rounds, m times there and back.

    Returns:
        the mean L1 distance, in [0, 1] for pixels in [0, 1].

    Raises:
        ValueError: if the two are not images of the same number and shape.
    """
    return _distance(images, returned)


def counterfactual_error(counterfactuals: np.ndarray, truth: np.ndarray) -> float:
    """Distance of the counterfactuals to the true ones, which only a simulator knows.

    Args:
        counterfactuals: counterfactuals (n, H, W, C) of some images.
        truth: what the same images would have been.

    Returns:
        the mean L1 distance, in [0, 1] for pixels in [0, 1].

    Raises:
        ValueError: if the two are not images of the same number and shape.
    """
    return _distance(counterfactuals, truth)


def counterfactual_effectiveness(
    attributes: np.ndarray, targets: np.ndarray, difference: Difference = absolute_difference
) -> np.ndarray:
    """Axiom of effectiveness: a counterfactual has the values of the attributes that it was to have.

    Args:
        attributes: attributes (n, A) read off the counterfactuals, by measurement or by a classifier.
        targets: what each was to be: the set values of intervened attributes, or all of the true counterfactual.
        difference: as in `mean_difference`.

    Returns:
        the mean absolute error (A,) of each attribute, in its unit; at least 0, lower is better.

    Raises:
        ValueError: if the two are not matrices of the same shape.
    """
    return mean_difference(attributes, targets, difference)


def counterfactual_minimality(
    factual: np.ndarray,
    counterfactual: np.ndarray,
    fixed: np.ndarray,
    difference: Difference = absolute_difference,
) -> np.ndarray:
    """Minimality: nothing moves but what the intervention moves.

    Measured as the change, from each image to its counterfactual, of the attributes that the graph forbids to move:
    those that are neither intervened on nor caused, directly or through others, by one that is. (`interference_matrix`
    measures the same on samples, relative to chance.) The literature's counterfactual latent divergence (Sanchez and
    Tsaftaris, 2022, arXiv 2202.10166; used by Melistas et al., 2024, arXiv 2403.20287) needs no graph, but ranks
    distances in a latent space, whose right value is unknown; here it is 0.

    Args:
        factual: attributes (n, A) read off the images.
        counterfactual: attributes (n, A) read, in the same way, off their counterfactuals.
        fixed: booleans (A,), whether the graph forbids the attribute to move.
        difference: as in `mean_difference`.

    Returns:
        the mean absolute change of each fixed attribute, (number of fixed,), in its unit; at least 0, lower is better.

    Raises:
        ValueError: if the attributes are not matrices of the same shape or `fixed` is not one boolean for each.
    """
    if fixed.dtype != bool or fixed.shape != factual.shape[1:]:
        raise ValueError(
            f"`fixed` has the shape {fixed.shape} and type {fixed.dtype}; give a boolean for each of the attributes "
            f"{factual.shape[1:]}."
        )
    return mean_difference(counterfactual, factual, difference)[fixed]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    check_images(a, b)
    if len(a) != len(b):
        raise ValueError(f"Got {len(a)} and {len(b)} images; give one of each for every image.")
    pairs = zip(a, b)  # one pair at a time: no float copy of all images
    return float(np.mean([np.abs(x / pixel_scale(a) - y / pixel_scale(b)).mean(dtype=np.float64) for x, y in pairs]))
