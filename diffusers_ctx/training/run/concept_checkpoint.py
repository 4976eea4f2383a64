"""What learning the concepts has come to, on disk: it can be stopped, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator

from .files import atomic_write
from .stop_signals import StopSignals


PROGRESS_NAME = "concepts-in-progress.pt"


class Stateful(Protocol):
    """Modules, optimizers, schedules."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class ConceptProgress:
    """Keeps what learning the concepts has come to: when a stage begins, every so many steps, and when the run is
    asked to stop, which it does then. What an earlier run has kept is taken up.

    Args:
        accelerator: of the run. Its main process writes; all take up what was written.
        folder: where it is kept.
        options: those that a run which takes it up must have.
        stop: whether the run is asked to stop.
        every: how many steps there are between two times.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, options: dict[str, Any], stop: StopSignals, every: int):
        self.accelerator = accelerator
        self.file = folder / PROGRESS_NAME
        self.options = options
        self.stop = stop
        self.every = every
        self._earlier = torch.load(self.file, map_location="cpu") if self.file.exists() else None
        self.values: torch.Tensor | None = None if self._earlier is None else self._earlier["values"]
        """(n, N, d), node values of the images, once they are found."""

    def take_up(self, stage: str, **parts: Stateful) -> int | None:
        """Gives the parts of a stage the state in which an earlier run has left them, if it has.

        Returns:
            How many of its steps are done; `None` if it is behind what the earlier run was doing.
        """
        if self._earlier is None:
            return 0
        if self._earlier["stage"] != stage:
            return None
        earlier, self._earlier = self._earlier, None
        for name, part in parts.items():
            part.load_state_dict(earlier["parts"][name])
        torch.set_rng_state(earlier["random"])
        return earlier["step"]

    def before_step(self, stage: str, step: int, **parts: Stateful) -> None:
        """Keeps the state of the parts if it is time. All processes must call it.

        Raises:
            OSError: if it cannot be written.
            SystemExit: if the run was asked to stop.
        """
        stopping = self.stop.requested()
        if stopping or step % self.every == 0:
            self._keep(stage, step, parts)
        if stopping:
            self._end_run()

    def look(self) -> None:
        """Where there is nothing to keep. All processes must call it.

        Raises:
            SystemExit: if the run was asked to stop.
        """
        if self.stop.requested():
            self._end_run()

    def _end_run(self) -> NoReturn:
        self.stop.end_run("while the concepts were learned")

    def _keep(self, stage: str, step: int, parts: dict[str, Stateful]) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "options": json.dumps(self.options),
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
    """The options of the run that has begun to learn concepts there; `None` if none has."""
    file = folder / PROGRESS_NAME
    return json.loads(torch.load(file, map_location="cpu", mmap=True)["options"]) if file.exists() else None


def remove_progress(accelerator: Accelerator, folder: Path) -> None:
    """When the concepts are learned, and kept elsewhere."""
    if accelerator.is_main_process:
        (folder / PROGRESS_NAME).unlink(missing_ok=True)
