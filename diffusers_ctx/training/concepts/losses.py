"""Distances between batches that are minimised while concepts are learned: sorted along random directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..run.keyed_noise import KeyedNoise


def unit_directions(random: KeyedNoise, dim: int, count: int = 64) -> torch.Tensor:
    """Random unit vectors (dim, count)."""
    return F.normalize(random.normal(dim, count), dim=0)


def sorted_distance(a: torch.Tensor, b: torch.Tensor, directions: torch.Tensor, groups: int) -> torch.Tensor:
    """Squared sliced Wasserstein distance of rows (B, ...), within `groups` equal parts of them.

    Args:
        a: (B, ...), flattened to (B, D).
        b: the same shape.
        directions: (D, P) unit vectors.
        groups: equal parts, in the order of the rows; the mean is over these and over directions.
    """
    a, b = ((x.flatten(1) @ directions).unflatten(0, (groups, -1)).sort(dim=1).values for x in (a, b))
    return (a - b).square().mean()


def prior_matching_loss(
    noise: torch.Tensor, reference: torch.Tensor, directions: torch.Tensor, groups: int
) -> torch.Tensor:
    """Distance of abducted noise (B, N, d) to N(0, I): in each of `groups` contexts, plus over all of them.

    Args:
        noise: (B, N, d), sorted by context, equally many of each.
        reference: (B, N, d), standard normal.
        directions: (N d, P) unit vectors.
        groups: number of contexts.
    """
    within, pooled = (sorted_distance(noise, reference, directions, parts) for parts in (groups, 1))
    return within + pooled
