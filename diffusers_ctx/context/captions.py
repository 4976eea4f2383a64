"""What captions tell of node values, so that noise can be drawn which goes with a prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def embed_captions(text: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, D) that captions are told apart by: the mean over tokens of what text encoders say (B, L, D)."""
    return text.float().mean(dim=1)


class CaptionLikelihood(nn.Module):
    r"""How likely a caption is, given node values: `log p(t | c) / p(t)`, but for a summand that depends on `t` alone.

    The inner product of an embedding of the values and one of the caption, which comes to that where `contrast` is at
    its least (van den Oord et al. 2018, arXiv 1807.03748, equation 5). It starts as zero: every caption goes with
    everything.

    Args:
        values_dim: number of an image's node values, N d.
        caption_dim: width of captions' embeddings.
        width: hidden width.
        dim: of both embeddings.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, values_dim: int, caption_dim: int, width: int = 64, dim: int = 16):
        super().__init__()
        self.embed_values = nn.Sequential(
            nn.Linear(values_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )
        # without a bias: what is known of the average caption is nothing
        self.embed_caption = nn.Linear(caption_dim, dim, bias=False)
        nn.init.zeros_(self.embed_caption.weight)
        self.register_buffer("mean", torch.zeros(caption_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def standardize(self, captions: torch.Tensor) -> None:
        """Takes mean and scale of captions' embeddings (n, D) for what is to be taken off and divided by."""
        self.mean.copy_(captions.mean(dim=0))
        self.scale.copy_((captions - self.mean).square().mean().sqrt().clamp(min=1e-6))

    def forward(self, values: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Scores (B, M), in nats, of each caption (B, D) for each of M node values (B, M, N, d) or (1, M, N, d)."""
        standard = (captions.to(self.mean.device, torch.float32) - self.mean.float()) / self.scale.float()
        embedded = self.embed_caption(standard.to(self.mean.dtype))
        return (self.embed_values(values.flatten(-2)) * embedded[:, None]).sum(dim=-1)

    def contrast(self, values: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy, in nats, of telling which of the values (B, N, d) each of the captions (B, D) is of."""
        return F.cross_entropy(self(values[None], captions), torch.arange(len(captions), device=values.device))
