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

from ...context import ContextModule, summands_of


COMPOSED_SHARE = 0.25  # of the images
LARGEST = 3  # concepts of a combination


def composition_losses(
    predict: Callable[[torch.Tensor], torch.Tensor],
    module: ContextModule,
    z: torch.Tensor,
    combinations: torch.Tensor,
) -> torch.Tensor:
    """Each image's squared distance (B,) of the prediction to the sum of [`~context.summands_of`], which is not
    learned from.

    Args:
        predict: context tokens (B, N, T, token_dim) to the backbone's prediction (B, C, h, w).
        module: the context module.
        z: (B, N, d_z), exogenous noise.
        combinations: (B, K), masks of zeros and ones.
    """
    with torch.no_grad():
        summands = summands_of(module, z, combinations)
        target = torch.stack([summand.weigh(predict(summand.tokens).float()) for summand in summands]).sum(dim=0)
    prediction = predict(module(z, combinations)).float()
    return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))


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
