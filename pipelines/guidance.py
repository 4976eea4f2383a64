"""Context guidance: adds to the UNet's prediction its contrast between a context and the observational one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        sample, timestep = args
        # under classifier-free guidance, the prompt's rows come second
        rows = slice(-len(observational_tokens), None)
        kwargs = _rows_of(kwargs, len(sample), rows)
        kwargs["added_cond_kwargs"] = kwargs["added_cond_kwargs"] | {"image_embeds": [observational_tokens]}
        observational = module.forward(sample[rows], timestep, **kwargs)[0]
        contrast = (scale - 1) * (output[0][rows] - observational)
        return (output[0] + contrast.repeat(len(sample) // len(contrast), 1, 1, 1), *output[1:])

    handle = unet.register_forward_hook(add_contrast, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _rows_of(value: Any, num_rows: int, rows: slice) -> Any:
    """These rows of all that has a row for each sample, such as the residuals of a ControlNet."""
    if isinstance(value, dict):
        return {name: _rows_of(entry, num_rows, rows) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rows_of(entry, num_rows, rows) for entry in value]
    is_per_row = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == num_rows
    return value[rows] if is_per_row else value
