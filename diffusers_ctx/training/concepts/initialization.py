"""Where in an image's code an intervention shows most: a start for the map to node values.

From random starts, most attempts at the map lose a concept on the way: its node settles on what is left over. From
these directions few do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


_IMAGES = 1000  # by which it is judged how Gaussian a direction is
_NEGENTROPY_WEIGHT = 6.0
_STARTS = 16
_STEPS = 200
_LEARNING_RATE = 0.05


def initial_directions(
    mean: torch.Tensor, variance: torch.Tensor, labels: torch.Tensor, contexts: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""An affine map of codes to node values: the first value of each concept's node is, as nearly as a rotation
    allows, the one in which the concept's contexts differ most from the observational one.

    Codes are whitened by their observational distribution. The direction of a concept is the unit vector `u` along
    which the Gaussian of the concept's contexts has the largest Kullback-Leibler divergence from the observational
    one,

    .. math:: 1/2 (u^T S u + (u^T \mu)^2 - 1 - \log u^T S u)

    for mean `\mu` and covariance `S` of the whitened codes, less six times the negentropy of the observational
    distribution along it (`(skewness^2 + excess kurtosis^2 / 4) / 12`, Hyvärinen and Oja, 2000, section 4.2.3): nodes
    have Gaussian distributions, and a fold of one, such as its absolute value, is not Gaussian. The directions
    together are replaced by the rotation that is closest to them (the polar factor): the map can be inverted well.

    Args:
        mean: (n, D), of the Gaussian over each image's code.
        variance: (n, D), of the same.
        labels: (n,), the row of `contexts` that each image belongs to.
        contexts: (C, K), the masks, that of the observational context among them.
        dim: how many values a node has, of the D.

    Returns:
        A weight (D, D) and a bias (D,), for `weight @ code + bias`.
    """
    masks = contexts.to(labels.device)[labels]
    observational = (masks == 0).all(dim=1)
    center, covariance = _moments(mean[observational], variance[observational])
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    plain = ((mean[observational].double() - center) @ whiten.T)[:_IMAGES]
    moments = [_moments(mean[intervened], variance[intervened]) for intervened in (masks > 0).T]
    shifts = torch.stack([whiten @ (shift - center) for shift, _ in moments])
    spreads = torch.stack([whiten @ spread @ whiten.T for _, spread in moments])
    directions = _most_different(shifts, spreads, plain)
    weight = _closest_rotation(directions) @ whiten
    places = [*range(0, len(directions) * dim, dim)]
    places += [place for place in range(len(weight)) if place not in places]
    weight = weight[torch.tensor(places).argsort()]
    return weight.to(mean), (-weight @ center).to(mean)


def _moments(mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of codes that are drawn from Gaussians, in double precision."""
    mean = mean.double()
    return mean.mean(dim=0), torch.cov(mean.T, correction=0) + variance.double().mean(dim=0).diag()


def _most_different(shifts: torch.Tensor, spreads: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """For each of K concepts the unit vector (K, D) with the largest `_merit`: the best of several ascents.

    Args:
        shifts: (K, D), means of the whitened codes of the concepts' contexts.
        spreads: (K, D, D), their covariances.
        plain: (n, D), whitened observational codes.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_STARTS, plain.shape[1], dtype=torch.double, generator=generator)
    vectors = start.repeat(len(shifts), 1, 1).requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=_LEARNING_RATE, maximize=True)
    for _ in range(_STEPS):
        _merit(vectors, shifts, spreads, plain).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    best = _merit(vectors, shifts, spreads, plain).argmax(dim=1)
    return F.normalize(vectors.detach()[torch.arange(len(best)), best], dim=1)


def _merit(vectors: torch.Tensor, shifts: torch.Tensor, spreads: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Divergence less weighted negentropy (K, V) along each of the vectors (K, V, D)."""
    units = F.normalize(vectors, dim=2)
    variance = ((units @ spreads) * units).sum(dim=2)
    divergence = (variance + (units @ shifts[..., None])[..., 0].square() - 1 - variance.log()) / 2
    along = units @ plain.T
    # a single image, or one repeated, has no distribution
    variances = along.var(dim=2, correction=min(1, len(plain) - 1), keepdim=True).clamp(min=1e-24)
    along = (along - along.mean(dim=2, keepdim=True)) / variances.sqrt()
    squares = along.square()  # powers of other degrees are ten times as slow
    skewness, kurtosis = (squares * along).mean(dim=2), squares.square().mean(dim=2) - 3
    negentropy = (skewness.square() + kurtosis.square() / 4) / 12
    return divergence - _NEGENTROPY_WEIGHT * negentropy


def _closest_rotation(directions: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows (D, D), the first K of which are as close as possible to the directions (K, D).

    `scipy.linalg.polar` gives the first K alone; the full SVD completes them to a basis as well.
    """
    left, _, right = torch.linalg.svd(directions, full_matrices=True)
    count = len(directions)
    return torch.cat([left @ right[:count], right[count:]])
