"""Noise that explains images, drawn from their posteriors."""

from __future__ import annotations

import torch

from ..context import ContextModule
from .latents import ContextLatents
from .noise import KeyedNoise


_IMAGES_AT_ONCE = 512


@torch.no_grad()
def draw_noise(
    context_module: ContextModule, latents: ContextLatents, rows: torch.Tensor, seed: int, device: torch.device
) -> torch.Tensor:
    """The mechanisms' noise (B, N, d_z) of some images, on the CPU.

    Args:
        context_module: has the posterior, on the device.
        latents: the images.
        rows: (B,), which ones.
        seed: of what is drawn.
        device: where to do it.
    """
    eps = KeyedNoise(seed, 0).normal(len(latents), *context_module.noise_shape)
    drawn = []
    for part in rows.split(_IMAGES_AT_ONCE):
        posterior = context_module.abduct(latents.seen[0, part].to(device), latents.masks[part].to(device))
        drawn.append(posterior.at(eps[part].to(device)).cpu())
    return torch.cat(drawn)
