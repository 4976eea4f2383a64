"""Light decoders to small latents; used in the concept stage and then thrown away."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn


_WIDTHS = (256, 512)
_CHANNELS = 64


class ConvDecoder(nn.Module):
    """Decodes codes (B, N, d) to small latents (B, C, s, s) with convolutions: they take most of the time of a step,
    and keep the code as smooth as the flow search needs it."""

    def __init__(self, num_nodes: int, dim: int, channels: int, size: int):
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(num_nodes * dim, _WIDTHS[0]), nn.SiLU(), nn.Linear(_WIDTHS[0], _CHANNELS * 16), nn.SiLU()
        )
        layers: list[nn.Module] = [nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1), nn.SiLU()]
        for _ in range(round(math.log2(size / 4))):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(_CHANNELS, channels, 3, padding=1))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.layers(self.project(codes.flatten(1)).unflatten(1, (_CHANNELS, 4, 4)))


class ValueDecoder(nn.Sequential):
    """Decodes node values (B, N, d_c) to small latents (B, C, s, s) with a multilayer perceptron."""

    def __init__(self, num_nodes: int, dim: int, channels: int, size: int):
        hidden = [layer for pair in pairwise((num_nodes * dim, *_WIDTHS)) for layer in (nn.Linear(*pair), nn.SiLU())]
        last = nn.Linear(_WIDTHS[-1], channels * size**2)
        super().__init__(nn.Flatten(), *hidden, last, nn.Unflatten(1, (channels, size, size)))
