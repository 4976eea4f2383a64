"""A moving average of the weights that learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from ..config import OptimizationConfig
from ..run.sharding import full_tensor, shard_like


class WeightAverage(EMAModel):
    """An average whose state is whole where it is sharded, and that loads it to where it was.

    Processes save one state for all of them: shards would be those of the main process.
    """

    shadow_params: list[torch.Tensor]

    def state_dict(self) -> dict[str, Any]:
        """All processes must ask for it."""
        # on the CPU: all of them together may not fit where there are shards
        return super().state_dict() | {"shadow_params": [full_tensor(tensor).cpu() for tensor in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            shard_like(tensor, other) for tensor, other in zip(self.shadow_params, before, strict=True)
        ]


def create_average(parameters: list[nn.Parameter], options: OptimizationConfig) -> WeightAverage | None:
    """The average that the options ask for, if any."""
    return WeightAverage(parameters, decay=options.ema_decay, use_ema_warmup=True) if options.use_ema else None


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
