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
def adding_predictions(model: ModelMixin, first: Summand, others: Sequence[Summand]) -> Iterator[None]:
    """While it is open, `model` predicts a sum, where it is given the tokens of the first summand.

    The sum is computed at the prompt, and what it differs by from the first prediction is added to both halves of
    classifier-free guidance; thus that and guidance by the context add up.

    Args:
        model: the UNet or transformer with a context module attached.
        first: the prediction of the call itself.
        others: the other predictions, each of which takes a pass of the model.
    """
    backbone = backbone_of(model)
    change = first._replace(weights=first.weights - 1)  # of the call's own prediction
    given: list[tuple[tuple, dict[str, Any]]] = []  # the arguments of a call, before tokens enter
    latest: list[tuple[Any, torch.Tensor]] = []  # a sample and its difference

    def remember(module, args, kwargs):
        given[:] = [(args, kwargs)]

    def add_difference(module, args, kwargs, output):
        # under classifier-free guidance, the prompt's rows come second
        rows, count = slice(-len(first.weights), None), len(output[0])
        args, kwargs = given.pop()
        sample = next(iter([*args, *kwargs.values()]))
        if latest and sample is latest[0][0]:  # guidance in a second call, without the prompt
            return (output[0] + latest[0][1], *output[1:])
        args, kwargs = (select_rows(value, count, rows) for value in (args, kwargs))
        difference = change.weigh(output[0][rows])
        for other in others:
            own = args, backbone.with_tokens(kwargs, other.tokens)
            # `forward` leaves out its hook, but not that of a compiled one's original
            own_args, own_kwargs = own if is_compiled_module(module) else backbone.enter_tokens(*own)
            difference = difference + other.weigh(module.forward(*own_args, **own_kwargs)[0])
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
