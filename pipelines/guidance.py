"""Predictions under several context tokens, weighed and added up while a plain pipeline samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils.torch_utils import is_compiled_module

from diffusers_ctx.adapter import backbone_of
from diffusers_ctx.context import Summand

from .conditioning import select_rows


@contextmanager
def adding_predictions(model: ModelMixin, weights: torch.Tensor, others: Sequence[Summand]) -> Iterator[None]:
    """While it is open, `model` predicts `w e(tokens) + Σ w_i e(tokens_i)`, where it is given `tokens`.

    The sum is computed at the prompt, and what it differs by from `e(tokens)` is added to both halves of
    classifier-free guidance; thus that and guidance by the context add up.

    Args:
        model: the UNet or transformer with a context module attached.
        weights: (B,), `w`.
        others: the other predictions, each of which takes a pass of the model.
    """
    backbone = backbone_of(model)
    given: list[tuple[tuple, dict[str, Any]]] = []  # the arguments of a call, before tokens enter
    latest: list[tuple[Any, torch.Tensor]] = []  # a sample and its difference

    def remember(module, args, kwargs):
        given[:] = [(args, kwargs)]

    def add_difference(module, args, kwargs, output):
        # under classifier-free guidance, the prompt's rows come second
        rows, count = slice(-len(weights), None), len(output[0])
        args, kwargs = given.pop()
        sample = next(iter([*args, *kwargs.values()]))
        if latest and sample is latest[0][0]:  # guidance in a second call, without the prompt
            return (output[0] + latest[0][1], *output[1:])
        args, kwargs = (select_rows(value, count, rows) for value in (args, kwargs))
        predicted = output[0][rows]
        difference = _per_row(weights - 1, predicted) * predicted
        for other in others:
            own = args, backbone.with_tokens(kwargs, other.tokens)
            if not is_compiled_module(
                module
            ):  # `forward` leaves out its hook, but not that of a compiled one's original
                own = backbone.enter_tokens(*own)
            difference = difference + _per_row(other.weights, predicted) * module.forward(*own[0], **own[1])[0]
        difference = torch.cat([difference] * (count // len(difference)))
        latest[:] = [(sample, difference)]
        return (output[0] + difference, *output[1:])

    handles = [
        model.register_forward_pre_hook(remember, with_kwargs=True, prepend=True),
        model.register_forward_hook(add_difference, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _per_row(weights: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """Weights (B,), as those of a prediction (B, ...)."""
    return weights.to(prediction).view(-1, *[1] * (prediction.ndim - 1))
