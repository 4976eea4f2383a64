"""Context guidance: adds to the UNet's prediction its contrast between a context and the observational one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel


@contextmanager
def context_guidance(unet: UNet2DConditionModel, observational_tokens: torch.Tensor, scale: float) -> Iterator[None]:
    """While it is open, `unet` predicts `e_obs + scale (e_do - e_obs)`: 1 is no guidance, more exaggerates.

    The contrast is computed at the prompt and added to both halves of classifier-free guidance; thus the two kinds of
    guidance add up. Rows without an intervention have no contrast and do not change.

    Args:
        unet: the UNet with a context module attached.
        observational_tokens: tokens (B, N, T, token_dim) of the same exogenous noise without interventions.
        scale: the context guidance scale.
    """

    def add_contrast(module, args, kwargs, output):
        rows = slice(-len(observational_tokens), None)  # under classifier-free guidance, the prompt's come second
        sample, timestep = args
        conditions = {name: c[rows] for name, c in kwargs["added_cond_kwargs"].items() if name != "image_embeds"}
        kwargs = {
            **kwargs,
            "encoder_hidden_states": kwargs["encoder_hidden_states"][rows],
            "added_cond_kwargs": conditions | {"image_embeds": [observational_tokens]},
        }
        observational = module.forward(sample[rows], timestep, **kwargs)[0]
        contrast = (scale - 1) * (output[0][rows] - observational)
        return (output[0] + contrast.repeat(len(sample) // len(contrast), 1, 1, 1), *output[1:])

    handle = unet.register_forward_hook(add_contrast, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
