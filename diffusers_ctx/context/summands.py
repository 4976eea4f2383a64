"""Combinations of interventions as sums: of what each of them does to a prediction."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .module import ContextModule


class Summand(NamedTuple):
    """One of the predictions that make a sum.

    Attributes:
        weights: (B,), what each row's prediction is multiplied by.
        tokens: (B, N, T, token_dim), which it is made from.
    """

    weights: torch.Tensor
    tokens: torch.Tensor

    def weigh(self, prediction: torch.Tensor) -> torch.Tensor:
        """The prediction (B, ...), times the weight of each row."""
        return self.weights.to(prediction).view(-1, *[1] * (prediction.ndim - 1)) * prediction


def summands_of(module: ContextModule, z: torch.Tensor, mask: torch.Tensor) -> list[Summand]:
    r"""The predictions that `e(c') + \sum_k (e(c'_k) - e(c'))` is made of, that of `c'` first.

    `c` are the node values under all interventions, `c'` the same but for the intervened nodes, which have their
    observational values, and `c'_k` has that of node `k` from `c`. Where concepts are independent given the image, the
    score under `c` is this sum (Liu et al. 2022, arXiv 2206.01714, equation 11, which adds what each of several
    conditions changes). With values in place of conditions, what an intervention does to its descendants is in each of
    the terms, and is not added up.

    Args:
        module: the context module.
        z: (B, N, d_z), exogenous noise.
        mask: (B, K), strengths of interventions in [0, 1].
    """
    together, apart = module(z, mask), module(z, torch.zeros_like(mask))
    nodes = F.pad(mask, (0, z.shape[1] - mask.shape[1])) > 0
    without, counts = _choose(nodes, apart, together), nodes.sum(dim=1)
    summands = [Summand(1 - counts.to(z), without)]
    order = nodes.int().argsort(dim=1, descending=True, stable=True)
    for place in range(int(counts.max())):
        node = F.one_hot(order[:, place], nodes.shape[1]).bool() & nodes  # of no node where there are no more
        summands.append(Summand((counts > place).to(z), _choose(node, together, without)))
    return summands


def _choose(nodes: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, T, D), of `chosen` for some nodes (B, N) and of `other` for the rest."""
    return torch.where(nodes[:, :, None, None], chosen, other)
