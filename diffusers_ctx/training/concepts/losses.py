"""The terms that are minimized while concepts are learned. Three losses sum them: `ConceptObjective` over images,
`search` over codes and `scm_fit` over moments of node values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...context.causal import ReducedForm, Structural
from ..run.keyed_noise import KeyedNoise


_DIRECTIONS = 64


def contrastive_loss(log_densities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of guessing an image's context by Bayes' rule with equal priors, at least 0.

    The volume of the map from image to values is the same in all contexts and cancels. So do all mechanisms but those
    that an intervention replaced (in the manner of Buchholz et al. 2023, arXiv 2306.02235, section 5).

    Args:
        log_densities: (B, C), of each image's node values in each context.
        labels: (B,), the context that each image belongs to.
    """
    return F.cross_entropy(log_densities, labels)


def gaussian_likelihood_loss(mse: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Negative log-likelihood in nats, up to a constant, of a Gaussian around a reconstruction at its best variance.

    Rybkin et al. 2021, arXiv 2006.13202, equation 5. Its balance with a KL term does not depend on the scale of what
    is reconstructed.

    Args:
        mse: mean squared error of the reconstruction.
        dimensions: how many values of an image are reconstructed.
    """
    return dimensions / 2 * mse.log()


def graph_penalty(causal: ReducedForm | Structural, acyclicity_weight: float, sparsity_weight: float) -> torch.Tensor:
    """Weighted sum of the penalties on cycles and on edges, at least 0."""
    return acyclicity_weight * causal.acyclicity() + sparsity_weight * causal.group_lasso()


def unit_directions(random: KeyedNoise, dim: int, count: int = _DIRECTIONS) -> torch.Tensor:
    """Random unit vectors (dim, count)."""
    return F.normalize(random.normal(dim, count), dim=0)


def sorted_distance(a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor, groups: int) -> torch.Tensor:
    """Squared sliced Wasserstein distance of rows (B, ...), within `groups` equal parts of them.

    `evaluation.sliced_wasserstein_distance`, the metric of samples, has neither gradients nor groups.

    Args:
        a: (B, ...), flattened to (B, D).
        b: the same shape.
        directions: (D, P) unit vectors.
        groups: equal parts, in the order of the rows; the mean is over these and over directions.
    """
    a, b = (_sorted_projections(x, directions, groups) for x in (a, b))
    return (a - b).square().mean()


def prior_matching_loss(noise: torch.Tensor, directions: torch.Tensor, groups: int) -> torch.Tensor:
    """Squared sliced Wasserstein distance of inferred noise to N(0, I): in each of `groups` contexts, plus over all.

    N(0, I) is N(0, 1) along every direction, so sorted projections are compared with the expected order statistics
    of that. Gradients are those of a comparison with random samples of N(0, I), averaged over the samples.

    Args:
        noise: (B, N, d), sorted by context, equally many of each.
        directions: (N d, P) unit vectors.
        groups: number of contexts.
    """
    parts = (_sorted_projections(noise, directions, count) for count in (groups, 1))
    within, pooled = ((part - _normal_order_statistics(part.shape[-1], part)).square().mean() for part in parts)
    return within + pooled


def _sorted_projections(x: torch.Tensor, directions: torch.Tensor, groups: int) -> torch.Tensor:
    """Projections (P, groups, B / groups), sorted along the last dimension, where sorting is fastest."""
    return (directions.T @ x.flatten(1).T).unflatten(1, (groups, -1)).sort(dim=2).values


def _normal_order_statistics(count: int, like: torch.Tensor) -> torch.Tensor:
    """Expected values of `count` sorted draws from N(0, 1), by Blom's approximation (1958)."""
    ranks = torch.arange(1, count + 1, dtype=like.dtype, device=like.device)
    return torch.special.ndtri((ranks - 0.375) / (count + 0.25))
