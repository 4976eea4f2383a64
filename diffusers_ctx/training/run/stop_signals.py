"""Stopping when asked to: clusters send SIGTERM before they take a machine away, people press Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import torch
from accelerate import Accelerator


_ANSWER = (
    "\nThe run (process {pid}) will stop when it has saved its progress; a second Ctrl-C, or `kill -INT {pid}`"
    " where a launcher has ended, stops it at once.\n"
)


class StopSignals:
    """Within its `with` block, SIGTERM and SIGINT ask the run to stop after its step, which is saved then. The answer
    says that.

    A second SIGINT stops it at once. A second SIGTERM does not: launchers pass it on to processes that the cluster has
    sent it to already. `accelerate launch` with a single process passes nothing on, and ends at the first Ctrl-C; send
    signals to the training process, which the answer names, or start that with `python`. Outside the main thread,
    where Python has no signals, nothing is caught.

    Args:
        accelerator: of the run; all its processes stop after the same step, and the main one answers.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._received = 0  # number of the signal, in this process
        self._agreed = 0  # that of any process, which all of them know
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {int(x): signal.signal(x, self._receive) for x in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop; the others may not know yet."""
        return self._received > 0

    def requested(self) -> bool:
        """Whether any process was asked to stop. All processes must call it, and all get the same answer.

        `Accelerator.check_trigger` says that too, but not which signal it was, which the exit code needs.
        """
        received = torch.tensor([self._received], device=self.accelerator.device)
        self._agreed = int(self.accelerator.gather(received).max())
        return self._agreed > 0

    def end_run(self, when: str) -> NoReturn:
        """Ends the run, which can be resumed, once [`~StopSignals.requested`] has said so.

        Args:
            when: such as "after step 3".

        Raises:
            SystemExit: with `exit_code`.
        """
        if self.accelerator.is_main_process:
            with suppress(OSError):  # Ctrl-C may have ended what reads it
                print(f"Stopped by a signal {when}; go on with `--resume_from_checkpoint latest`.", flush=True)
        self.accelerator.end_training()
        raise SystemExit(self.exit_code)

    @property
    def exit_code(self) -> int:
        """What shells expect of a program that a signal ended."""
        return 128 + self._agreed

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self._received = not self.received, number
        if first and self.accelerator.is_main_process:
            with suppress(OSError):  # Ctrl-C may have ended what reads it
                # a signal may come while Python's own streams are being written to
                os.write(2, _ANSWER.format(pid=os.getpid()).encode())
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])
