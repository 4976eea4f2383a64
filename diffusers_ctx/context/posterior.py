"""Abduction: the posterior of the exogenous noise given an image and its context, `q(z | x, m)`.

It depends on the context because the same value of a concept comes from different noise under the observational and
the intervened mechanism; otherwise the aggregate posterior could not be N(0, I) in every context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


# latents; features of the base model, by the name that it has in pipelines; features of a CLIP image encoder
PosteriorEncoder = Literal["vae", "unet", "transformer", "clip"]


@dataclass
class GaussianPosterior:
    """A Gaussian over the exogenous noise of a batch: `z = mean + factor eps` with `eps ~ N(0, I)`.

    Attributes:
        mean: (B, N, d).
        factor: (B, N d, N d).
        log_volume: (B, N), each node's share of `log |det factor|`.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    log_volume: torch.Tensor

    @classmethod
    def diagonal(cls, mean: torch.Tensor, log_variance: torch.Tensor) -> GaussianPosterior:
        """With independent coordinates, from means and log-variances (B, N, d)."""
        factor = torch.diag_embed((0.5 * log_variance).exp().flatten(1))
        return cls(mean, factor, 0.5 * log_variance.sum(dim=-1))

    def at(self, eps: torch.Tensor) -> torch.Tensor:
        """The noise (B, N, d) at standard normal `eps` of the same shape: a draw, differentiable in the parameters."""
        return self.mean + (self.factor @ eps.flatten(1)[..., None])[..., 0].view_as(self.mean)

    def kl(self) -> torch.Tensor:
        """KL divergence from N(0, I) in nats, (B, N): each node's share; the sum over nodes is exact."""
        variances = self.factor.square().sum(dim=-1).view_as(self.mean)
        return 0.5 * (self.mean.square() + variances - 1).sum(dim=-1) - self.log_volume


class Standardization(nn.Module):
    """Brings each channel of feature maps (B, C, h, w) to mean 0 and standard deviation 1 over the images that it was
    fitted to: the channels of pretrained networks have any scale."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def fit(self, features: torch.Tensor) -> None:
        """Fits mean and standard deviation to these maps (n, C, h, w)."""
        std, mean = torch.std_mean(features, dim=(0, 2, 3), keepdim=True)
        self.mean.copy_(mean[0])
        self.std.copy_(std[0].clamp(min=1e-3 * std.mean()))  # channels that hardly vary are not blown up

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


class LatentEncoder(nn.Module):
    """Features (B, width * 16) of VAE latents or other maps: halves them down to 4x4 and keeps the positions apart.

    Args:
        in_channels: channels of the latents.
        width: channels of the convolutions.
        sample_size: height and width of the latents that the encoder is made for; others are pooled to fit.
        standardize: whether channels are standardized first, see `Standardization`.
    """

    def __init__(self, in_channels: int, width: int, sample_size: int, standardize: bool = False):
        super().__init__()
        halvings = max(0, round(math.log2(sample_size / 4)))
        layers: list[nn.Module] = [Standardization(in_channels)] if standardize else []
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(halvings):
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Flatten()]
        self.layers = nn.Sequential(*layers)
        self.out_dim = width * 16

    def fit(self, maps: torch.Tensor) -> None:
        """Fits the standardization to these maps (n, C, h, w), before training."""
        standardization = self.layers[0]
        assert isinstance(standardization, Standardization)
        standardization.fit(maps)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.layers(latents)


class GaussianHead(nn.Module):
    """Mean and log-variance (B, N, d) of every node from features (B, in_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, num_nodes: int, dim: int):
        super().__init__()
        self.shape = (2, num_nodes, dim)
        self.layers = nn.Sequential(
            nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, 2 * num_nodes * dim)
        )

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_variance = self.layers(features).unflatten(-1, self.shape).unbind(dim=1)
        return mean, log_variance.clamp(-12, 4)
