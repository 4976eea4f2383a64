"""How the generation of counterfactuals is kept to the images that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .inversion import Model, OnStep


@dataclass
class OnPath:
    """After each step of the generation, relates its sample to the inverted images.

    Attributes:
        path: the images' noisy samples (B, C, h, w), from the noisy end on, through which the inversion went.
        callback: given the step's number, its timestep and the sample, returns what to go on with.
        is_led: whether the factual images are generated too, as the first half of the sample. What they miss of the
            path is then added to both halves, so that errors of theirs do not become differences (Ju et al. 2023,
            arXiv 2310.01506, correct the factual half alone).
        region: how much each pixel may change (B or 1, 1, H, W); where it is 0, the sample is the path's.
    """

    path: Sequence[torch.Tensor]
    callback: OnStep
    is_led: bool = False
    region: torch.Tensor | None = None

    def __call__(self, step: int, timestep: float, sample: torch.Tensor) -> torch.Tensor:
        origin = self.path[step + 1]
        if self.is_led:
            factual, sample = sample.chunk(2)
            sample = sample + (origin - factual)
        if self.region is not None:
            may_change = F.adaptive_max_pool2d(self.region.to(sample), sample.shape[2:]) > 0
            sample = torch.where(may_change, sample, origin)
        sample = self.callback(step, timestep, sample)
        return torch.cat([origin.expand_as(sample), sample]) if self.is_led else sample


def contrast(model: Model, origin: Model, scale: float) -> Model:
    """A model whose contrast to another one is scaled: 0 is that of `origin`, and 1 that of `model`."""

    def contrasted(x: torch.Tensor, t: float) -> torch.Tensor:
        predicted = origin(x, t)
        return predicted + scale * (model(x, t) - predicted)

    return contrasted
