"""How well held-out images of each concept are distinguished from observational ones, while concepts are learned."""

from __future__ import annotations

import torch

from ...context import ContextModule
from ..encoding.latents import ContextLatents
from .codes import read_codes
from .losses import contrastive_loss


@torch.no_grad()
def held_out_contrast(module: ContextModule, held_out: ContextLatents) -> dict[str, torch.Tensor]:
    """The contrast of each concept: the cross-entropy in nats of guessing, from the node values of an image, whether
    it is observational or of the context of that concept alone. Log 2 is what a coin says; the contrast on training
    images falls below it also where images are learned by heart.

    Args:
        module: has an inverse posterior, which reads values without a look at the context.
        held_out: images that do not train; concepts that have none, alone or in the observational context, are left
            out.
    """
    values, _ = read_codes(module, held_out)
    found = {}
    for index, name in enumerate(module.config.concepts):
        masks = torch.zeros(2, held_out.masks.shape[1])
        masks[1, index] = 1
        is_of = (held_out.masks[:, None] == masks).all(dim=-1)  # (n, 2)
        if is_of.any(dim=0).all():
            rows = is_of.any(dim=1).to(values.device)
            densities = module.log_prob(values[rows], masks.to(values))
            found[name] = contrastive_loss(densities, is_of[:, 1].to(values.device)[rows].long())
    return found
