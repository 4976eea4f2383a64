"""Checkpoints of concept learning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator

from .files import atomic_write
from .stop_signals import StopSignals


PROGRESS_NAME = "concepts-in-progress.pt"
_STATE = ("contract", "stage", "step", "parts", "values", "random")


class Stateful(Protocol):
    """Modules, optimizers, schedules."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class ConceptCheckpoint:
    """Saves the state of concept learning when a stage begins, every so many steps, and when the run is asked to stop,
    which it does then. A later run resumes from what was saved.

    Args:
        accelerator: of the run. Its main process writes; all resume from what was written.
        folder: where the file is.
        contract: the options that a run which resumes must have.
        stop: whether the run is asked to stop.
        every: steps between two saves.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, contract: dict[str, Any], stop: StopSignals, every: int
    ):
        self.accelerator = accelerator
        self.file = folder / PROGRESS_NAME
        self.contract = contract
        self.stop = stop
        self.every = every
        self._earlier = _read(self.file) if self.file.exists() else None
        self.values: torch.Tensor | None = None if self._earlier is None else self._earlier["values"]
        """(n, N, d), node values of the images, once they are found."""

    def resume(self, stage: str, **parts: Stateful) -> float:
        """Gives the parts of a stage the state that an earlier run saved.

        Returns:
            The steps of the stage that are done; infinity where the earlier run was past it.
        """
        if self._earlier is None:
            return 0
        if self._earlier["stage"] != stage:
            return math.inf
        earlier, self._earlier = self._earlier, None
        for name, part in parts.items():
            part.load_state_dict(earlier["parts"][name])
        torch.set_rng_state(earlier["random"])
        return earlier["step"]

    def maybe_save(self, stage: str, step: int, **parts: Stateful) -> None:
        """Saves the state of the parts before this step, if it is time. All processes must call it.

        Raises:
            OSError: if it cannot be written.
            SystemExit: if the run was asked to stop.
        """
        stopping = self.stop.requested()
        if stopping or step % self.every == 0:
            self._save(stage, step, parts)
        if stopping:
            self._end_run()

    def check_stop(self) -> None:
        """Where there is nothing to save. All processes must call it.

        Raises:
            SystemExit: if the run was asked to stop.
        """
        if self.stop.requested():
            self._end_run()

    def remove(self) -> None:
        """Once the concepts are learned, and saved elsewhere."""
        if self.accelerator.is_main_process:
            self.file.unlink(missing_ok=True)

    def _end_run(self) -> NoReturn:
        self.stop.end_run("while the concepts were learned")

    def _save(self, stage: str, step: int, parts: dict[str, Stateful]) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "contract": json.dumps(self.contract),
            "stage": stage,
            "step": step,
            "parts": {name: part.state_dict() for name, part in parts.items()},
            "values": self.values,
            "random": torch.get_rng_state(),
        }
        try:
            atomic_write(self.file, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:  # a full disk is both, by what writes
            raise OSError(
                f"{self.file} could not be written ({error}). If the disk is full, free some of it; then go on with"
                " `--resume_from_checkpoint latest`."
            ) from error


def contract_of_progress(folder: Path) -> dict[str, Any] | None:
    """The contract of the run that has begun to learn concepts there; `None` if none has.

    Raises:
        ValueError: if what it saved is damaged.
    """
    file = folder / PROGRESS_NAME
    return json.loads(_read(file, mmap=True)["contract"]) if file.exists() else None


def _read(file: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", mmap=mmap)
        return {name: state[name] for name in _STATE}
    except Exception as error:  # which one depends on where the file is cut off
        raise ValueError(f"{file} is damaged; remove it, and the concepts are learned from the beginning.") from error
