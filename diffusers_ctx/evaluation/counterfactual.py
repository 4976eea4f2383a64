"""Soundness of counterfactual images: Pearl's axioms as measured by Monteiro et al. (2023, arXiv 2303.01274),
minimality, and the distance to the true counterfactual. Lower is better in all of them, and 0 is perfect.

Images are (n, H, W, C), uint8, which is scaled to [0, 1], or float, which is taken as it is. Image i of one set
belongs to image i of the other. No axiom suffices alone: a model that returns each image unchanged satisfies
composition, reversibility and minimality, and fails effectiveness.
"""

from __future__ import annotations

import numpy as np

from .images import check_images, pixel_scale
from .interference import Difference, absolute_difference, mean_difference


def counterfactual_error(counterfactuals: np.ndarray, expected: np.ndarray) -> float:
    """Mean L1 distance of counterfactual images to what they should be.

    Three soundness measures are this distance, and differ in what is compared:

    - *Composition* (axiom): the counterfactual under an image's own context is the image. Give the images and their
      counterfactuals under the context that they have, or the result of m such rounds. Not to be confused with
      composing several interventions.
    - *Reversibility* (axiom): going to another context and back returns the image. Give the images and what came back.
    - *Error*: give the counterfactuals and the true ones, which only a simulator knows.

    Args:
        counterfactuals: images (n, H, W, C).
        expected: what each should be (n, H, W, C).

    Returns:
        the mean absolute difference of pixels, in [0, 1] for pixels in [0, 1].

    Raises:
        ValueError: if the two are not images of the same number and shape.
    """
    check_images(counterfactuals, expected)
    if len(counterfactuals) != len(expected):
        raise ValueError(f"Got {len(counterfactuals)} and {len(expected)} images; give one of each for every image.")
    scales = pixel_scale(counterfactuals), pixel_scale(expected)
    errors = [  # one pair at a time: no float copy of all images
        np.abs(x / scales[0] - y / scales[1]).mean(dtype=np.float64) for x, y in zip(counterfactuals, expected)
    ]
    return float(np.mean(errors))


def counterfactual_effectiveness(
    attributes: np.ndarray, targets: np.ndarray, difference: Difference = absolute_difference
) -> np.ndarray:
    """Axiom of effectiveness: a counterfactual has the attributes that the intervention sets.

    Args:
        attributes: attributes (n, A) read off the counterfactuals, by measurement or by a classifier.
        targets: target values (n, A): those that the intervention sets, or all of the true counterfactual.
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
    those that are neither intervened on nor descend from one that is. (`interference_matrix` measures the same on
    samples, relative to chance.) The literature's counterfactual latent divergence (Sanchez and
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
