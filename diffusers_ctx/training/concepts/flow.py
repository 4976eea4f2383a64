"""An invertible map of an image's code to the values of its causal variables: a normalizing flow."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn


_LAYERS = 6
_WIDTH = 64


class InvertibleLinear(nn.Module):
    """`y = W x + b`; `W` starts as a random rotation."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(dim, dim))[0])
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        log_volume = torch.linalg.slogdet(self.weight).logabsdet
        return F.linear(x, self.weight, self.bias), log_volume.expand(len(x))


class AffineCoupling(nn.Module):
    """Scales and shifts the second half of a vector by functions of the first (Dinh et al. 2017, arXiv 1605.08803,
    equations 4 and 5); starts as the identity."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.kept = dim // 2
        sizes = [self.kept, width, width]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        last = nn.Linear(width, 2 * (dim - self.kept))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self.layers(kept).chunk(2, dim=1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        return torch.cat([kept, changed * log_scale.exp() + shift], dim=1), log_scale.sum(dim=1)


class NormalizingFlow(nn.Module):
    """Linear maps with couplings between them: (B, D) to (B, D)."""

    def __init__(self, dim: int, num_layers: int = _LAYERS, width: int = _WIDTH):
        super().__init__()
        layers: list[nn.Module] = [InvertibleLinear(dim)]
        if dim > 1:
            for _ in range(num_layers):
                layers += [AffineCoupling(dim, width), InvertibleLinear(dim)]
        self.layers = nn.ModuleList(layers)

    @torch.no_grad()
    def start_at(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Makes a new map, which is linear, this one: `weight` (D, D) and `bias` (D,)."""
        last = cast(InvertibleLinear, self.layers[-1])
        columns, _ = self(torch.eye(len(bias), device=bias.device))
        last.weight.copy_(weight @ torch.linalg.solve(columns.T, last.weight))
        last.bias.copy_(bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        log_volume = x.new_zeros(len(x))
        for layer in self.layers:
            x, volume = layer(x)
            log_volume = log_volume + volume
        return x, log_volume
