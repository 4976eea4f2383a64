"""Context guidance: adds to the prediction its contrast between a context and the observational one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import is_compiled_module

from diffusers_ctx.adapter import backbone_of

from .conditioning import select_rows


@contextmanager
def context_guidance(model: ModelMixin, observational_tokens: torch.Tensor, scale: float) -> Iterator[None]:
    """While it is open, `model` predicts `e_obs + scale (e_do - e_obs)`: 1 is no guidance, more exaggerates.

    The contrast is computed at the prompt and added to both halves of classifier-free guidance; thus the two kinds of
    guidance add up. Rows without an intervention have no contrast and do not change.

    Args:
        model: the UNet or transformer with a context module attached.
        observational_tokens: tokens (B, N, T, token_dim) of the same exogenous noise without interventions.
        scale: the context guidance scale.
    """
    backbone = backbone_of(model)
    given: list[tuple[tuple, dict[str, Any]]] = []  # the arguments of a call, before tokens enter
    latest: list[tuple[Any, torch.Tensor]] = []  # a sample and its contrast

    def remember(module, args, kwargs):
        given[:] = [(args, kwargs)]

    def add_contrast(module, args, kwargs, output):
        # under classifier-free guidance, the prompt's rows come second
        rows, count = slice(-len(observational_tokens), None), len(output[0])
        args, kwargs = given.pop()
        sample = next(iter([*args, *kwargs.values()]))
        if latest and sample is latest[0][0]:  # guidance in a second call, without the prompt
            return (output[0] + latest[0][1], *output[1:])
        args, kwargs = (select_rows(value, count, rows) for value in (args, kwargs))
        kwargs = backbone.with_tokens(kwargs, observational_tokens)
        if not is_compiled_module(module):  # `forward` leaves out its hook, but not that of a compiled one's original
            args, kwargs = backbone.enter_tokens(args, kwargs)
        observational = module.forward(*args, **kwargs)[0]
        contrast = (scale - 1) * (output[0][rows] - observational)
        contrast = torch.cat([contrast] * (count // len(contrast)))
        latest[:] = [(sample, contrast)]
        return (output[0] + contrast, *output[1:])

    handles = [
        model.register_forward_pre_hook(remember, with_kwargs=True, prepend=True),
        model.register_forward_hook(add_contrast, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
