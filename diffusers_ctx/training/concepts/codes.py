"""What an inverse posterior reads off all images of a set."""

from __future__ import annotations

import torch

from ...context import ContextModule
from ..encoding.latents import ContextLatents


_IMAGES_AT_ONCE = 512  # the encoder's activations of a whole set need not fit into memory


@torch.no_grad()
def read_codes(module: ContextModule, latents: ContextLatents) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (n, N, d_c) of the values that images show, not flipped, on the module's device.

    Args:
        module: has an inverse posterior.
        latents: n images.
    """
    images = latents.posterior_input[0].split(_IMAGES_AT_ONCE)
    mean, log_variance = zip(*(module.read_code(part.to(module.device)) for part in images))
    return torch.cat(mean), torch.cat(log_variance)
