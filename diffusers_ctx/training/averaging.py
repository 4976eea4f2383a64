"""A moving average of the weights that learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.training_utils import EMAModel
from torch import nn

from .config import OptimizationConfig


def create_average(parameters: list[nn.Parameter], options: OptimizationConfig) -> EMAModel | None:
    """The average that the options ask for, if any."""
    return EMAModel(parameters, decay=options.ema_decay, use_ema_warmup=True) if options.use_ema else None


@contextmanager
def averaged(average: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within its `with` block the parameters are their average, if there is one."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
