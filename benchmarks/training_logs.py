"""The log of a training: the large event files of TensorBoard in its folder, as a small table."""

from __future__ import annotations

import csv
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


LOGGED_EVERY = 10  # steps


def write_log(folder: Path, file: Path) -> None:
    """Writes metric, step and value, every tenth step and the last one, to a CSV file, if there are event files."""
    lines = [line for events in _event_folders(folder) for line in _scalars(events)]
    if not lines:
        return
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([("metric", "step", "value"), *lines])
    unfinished.replace(file)


def _event_folders(folder: Path) -> list[Path]:
    return sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})


def _scalars(folder: Path) -> list[tuple[str, int, str]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()  # 0: all of them
    lines = []
    for metric in events.Tags()["scalars"]:
        # a later run overwrites the steps of an earlier one
        values = {event.step: event.value for event in events.Scalars(metric)}
        kept = [step for step in sorted(values) if step % LOGGED_EVERY == 0 or step == max(values)]
        lines += [(metric, step, f"{values[step]:.6g}") for step in kept]
    return lines
