"""The composition loss: interventions together change a prediction by the sum of what each of them does.

Contexts show one intervention at a time, and nothing in their images says what several do together. Where concepts
are independent given the image, the score of a combination is the observational score plus the change that each
intervention makes to it (Liu et al. 2022, arXiv 2206.01714, equation 11; Gaudi et al. 2025, arXiv 2503.01145, train a
model for this independence). Sampling by that sum takes a pass of the model for each concept; one that has learned
it needs one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ...context import ContextModule


COMPOSED_SHARE = 0.25  # of the images
LARGEST = 3  # concepts of a combination


def composition_losses(
    predict: Callable[[torch.Tensor], torch.Tensor],
    module: ContextModule,
    z: torch.Tensor,
    combinations: torch.Tensor,
) -> torch.Tensor:
    r"""Each image's squared distance (B,) of `e(c)` to `e(c') + \sum_k (e(c'_k) - e(c'))`, which is not learned from.

    `c` are the node values under all interventions of a combination, `c'` the same but for the intervened nodes, which
    have their observational values, and `c'_k` has that of node `k` from `c`. So what an intervention does to its
    descendants is in each of the terms, and is not added up.

    Args:
        predict: context tokens (B, N, T, token_dim) to the backbone's prediction (B, C, h, w).
        module: the context module.
        z: (B, N, d_z), exogenous noise.
        combinations: (B, K), masks of zeros and ones.
    """
    together, apart = module(z, combinations), module(z, torch.zeros_like(combinations))
    with torch.no_grad():
        nodes = F.pad(combinations, (0, z.shape[1] - combinations.shape[1])) > 0
        without = _choose(nodes, apart, together)
        base = predict(without)
        target = base.clone()
        order = nodes.int().argsort(dim=1, descending=True, stable=True)
        for place in range(int(nodes.sum(dim=1).max())):
            node = F.one_hot(order[:, place], nodes.shape[1]).bool() & nodes  # of no node where there are no more
            target += predict(_choose(node, together, without)) - base
    return F.mse_loss(predict(together).float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def draw_combinations(mask: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Combinations (B, K) of what images' contexts intervene on and further concepts: two or three together.

    Args:
        mask: (B, K), masks of the contexts.
        uniform: (B, K + 1), numbers in [0, 1): the order in which concepts are added, and the size.
    """
    smallest, largest = min(2, mask.shape[1]), min(LARGEST, mask.shape[1])
    sizes = smallest + (uniform[:, -1:] * (largest - smallest + 1)).long()
    ranks = (uniform[:, :-1] + (mask > 0)).argsort(dim=1, descending=True).argsort(dim=1)
    return ((ranks < sizes) | (mask > 0)).to(mask)


def _choose(nodes: torch.Tensor, chosen: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, T, D), of `chosen` for some nodes (B, N) and of `other` for the rest."""
    return torch.where(nodes[:, :, None, None], chosen, other)
