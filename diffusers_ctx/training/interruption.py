"""Stopping when asked to: clusters send SIGTERM before they take a machine away, people press Ctrl-C."""

from __future__ import annotations

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopSignals:
    """Within its `with` block, SIGTERM and SIGINT ask the run to stop after its step; a second one stops it at once.

    Args:
        accelerator: of the run; all its processes stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received = 0  # number of the signal

    def __enter__(self) -> StopSignals:
        self._previous = {int(x): signal.signal(x, self._receive) for x in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether any process was asked to stop. All processes must call it."""
        if self.accelerator.num_processes == 1:
            return self.received > 0
        received = torch.tensor(self.received, device=self.accelerator.device)
        self.received = int(self.accelerator.gather(received).max())
        return self.received > 0

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that a signal ended."""
        return 128 + self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
