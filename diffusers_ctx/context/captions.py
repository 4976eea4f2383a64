"""What captions say about node values, for drawing noise that fits a prompt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def embed_captions(text: torch.Tensor) -> torch.Tensor:
    """Embeddings (B, D) of captions: the mean over the tokens of their encodings (B, L, D)."""
    return text.float().mean(dim=1)


class CaptionLikelihood(nn.Module):
    r"""How likely a caption is, given node values: `log p(t | c) / p(t)`, up to a summand that depends on `t` alone.

    The inner product of an embedding of the values and one of the caption, which estimates it where the contrastive
    loss `contrast` is minimal (van den Oord et al. 2018, arXiv 1807.03748, equation 5). It starts at zero: every
    caption fits everything.

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
        # without a bias: the average caption says nothing
        self.embed_caption = nn.Linear(caption_dim, dim, bias=False)
        nn.init.zeros_(self.embed_caption.weight)
        self.register_buffer("mean", torch.zeros(caption_dim))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def standardize(self, captions: torch.Tensor) -> None:
        """Fits the mean and the one scale of all dimensions to captions' embeddings (n, D)."""
        self.mean.copy_(captions.mean(dim=0))
        self.scale.copy_((captions - self.mean).square().mean().sqrt().clamp(min=1e-6))

    def forward(self, values: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Scores (B, M), in nats, of each caption (B, D) for each of M node values (B, M, N, d) or (1, M, N, d)."""
        standard = (captions.to(self.mean.device, torch.float32) - self.mean.float()) / self.scale.float()
        embedded = self.embed_caption(standard.to(self.mean.dtype))
        return (self.embed_values(values.flatten(-2)) * embedded[:, None]).sum(dim=-1)

    def contrast(self, values: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
        """Contrastive loss, in nats: the cross-entropy of matching captions (B, D) to their values (B, N, d)."""
        return F.cross_entropy(self(values[None], captions), torch.arange(len(captions), device=values.device))
