"""Where in an image's code an intervention shows most: a start for the map to node values.

From random starts, most attempts at the map lose a concept on the way: its node settles on what is left over. From
these directions few do.
"""

from __future__ import annotations

import torch


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

    Codes are whitened by their observational law. The direction of a concept is the unit vector `u` along which the
    Gaussian of the concept's contexts has the largest Kullback-Leibler divergence from the observational one,

    .. math:: 1/2 (u^T S u + (u^T \mu)^2 - 1 - \log u^T S u)

    for mean `\mu` and covariance `S` of the whitened codes, less six times the negentropy of the observational law
    along it (`(skewness^2 + excess kurtosis^2 / 4) / 12`, Hyvärinen and Oja, 2000, section 4.2.3): laws of nodes are
    Gaussian, and a fold of one, such as its absolute value, is not. The directions together are replaced by the
    rotation that is closest to them (the polar factor), so that the map can be inverted well.

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
    directions = []
    for concept in range(contexts.shape[1]):
        intervened = masks[:, concept] > 0
        shift, spread = _moments(mean[intervened], variance[intervened])
        directions.append(_most_different(whiten @ (shift - center), whiten @ spread @ whiten.T, plain))
    weight = _closest_rotation(torch.stack(directions)) @ whiten
    places = [*range(0, len(directions) * dim, dim)]
    places += [place for place in range(len(weight)) if place not in places]
    weight = weight[torch.tensor(places).argsort()]
    return weight.to(mean), (-weight @ center).to(mean)


def _moments(mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (D,) and covariance (D, D) of codes that are drawn from Gaussians, in double precision."""
    mean = mean.double()
    return mean.mean(dim=0), torch.cov(mean.T, correction=0) + variance.double().mean(dim=0).diag()


def _most_different(shift: torch.Tensor, spread: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """The unit vector (D,) of the largest divergence, less the negentropy of white codes (n, D) along it: the best of
    several ascents."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_STARTS, len(shift), dtype=torch.double, generator=generator)
    vectors = start.requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=_LEARNING_RATE, maximize=True)
    for _ in range(_STEPS):
        _merit(vectors, shift, spread, plain).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    best = vectors.detach()[_merit(vectors, shift, spread, plain).argmax()]
    return best / best.norm()


def _merit(vectors: torch.Tensor, shift: torch.Tensor, spread: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """What `_most_different` maximises, (V,), for each of the vectors (V, D)."""
    units = vectors / vectors.norm(dim=1, keepdim=True)
    variance = ((units @ spread) * units).sum(dim=1)
    divergence = (variance + (units @ shift).square() - 1 - variance.log()) / 2
    along = plain @ units.T
    # of a single image, or of one repeated, there is no law to be seen
    variances = along.var(dim=0, correction=min(1, len(along) - 1)).clamp(min=1e-24)
    along = (along - along.mean(dim=0)) / variances.sqrt()
    skewness, kurtosis = along.pow(3).mean(dim=0), along.pow(4).mean(dim=0) - 3
    negentropy = (skewness.square() + kurtosis.square() / 4) / 12
    return divergence - _NEGENTROPY_WEIGHT * negentropy


def _closest_rotation(directions: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows (D, D), of which the first K are as close as can be to the directions (K, D)."""
    left, _, right = torch.linalg.svd(directions, full_matrices=True)
    count = len(directions)
    return torch.cat([left @ right[:count], right[count:]])
