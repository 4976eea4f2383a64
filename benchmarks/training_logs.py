"""The log of a training: the large event files of TensorBoard in its folder, as a small table."""

from __future__ import annotations

import csv
from pathlib import Path

from diffusers_ctx.plot import read_training_log


LOGGED_EVERY = 10  # steps


def write_log(folder: Path, file: Path) -> None:
    """Writes metric, step and value, every tenth step and the last one, to a CSV file, if there are event files."""
    try:
        log = read_training_log(folder)
    except FileNotFoundError:
        return
    lines = [
        (metric, step, f"{value:.6g}")
        for metric, values in log.items()
        for step, value in values.items()
        if step % LOGGED_EVERY == 0 or step == max(values)
    ]
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([("metric", "step", "value"), *lines])
    unfinished.replace(file)
