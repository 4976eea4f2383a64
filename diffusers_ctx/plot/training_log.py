"""Reads what a training logged, from TensorBoard's files or from a table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from ..paths import local_path


TrainingLog = dict[str, dict[int, float]]
"""The values of each metric by step."""


def read_training_log(path: str | Path) -> TrainingLog:
    """Metrics of a training run.

    Args:
        path: the output folder of a run with TensorBoard's files somewhere in it, a `.csv` file with the columns
            `metric`, `step` and `value`, or a `.jsonl` file with a `step` and metrics in each line.

    Raises:
        FileNotFoundError: if there is no such file or folder, or the folder has no log.
        ImportError: if the log is TensorBoard's, which is not installed.
        ValueError: if the file is of another kind, or damaged.
    """
    path = local_path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}.")
    if path.is_dir():
        return _of_folder(path)
    readers = {".csv": _csv_points, ".jsonl": _jsonl_points}
    if path.suffix not in readers:
        raise ValueError(f"{path} is no log; give a run's folder, a .csv file or a .jsonl file.")
    log: TrainingLog = {}
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            for metric, step, value in readers[path.suffix](lines):
                log.setdefault(metric, {})[step] = value
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or no log of a training ({error!r}).") from error
    return log


def _of_folder(folder: Path) -> TrainingLog:
    """The metrics in TensorBoard's files: where runs were resumed, later files replace steps of earlier ones."""
    folders = sorted({file.parent for file in folder.rglob("events.out.tfevents.*")})
    if not folders:
        raise FileNotFoundError(f"There is no log in {folder}; was the run started with `--report_to none`?")
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ImportError(
            "This log is TensorBoard's, which is not installed; run `pip install 'diffusers-ctx[train]'`."
        ) from error
    log: TrainingLog = {}
    for place in folders:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()  # 0: all of them
        for metric in events.Tags()["scalars"]:
            log.setdefault(metric, {}).update({event.step: event.value for event in events.Scalars(metric)})
    return {metric: dict(sorted(values.items())) for metric, values in log.items()}


def _csv_points(lines: Iterable[str]) -> Iterable[tuple[str, int, float]]:
    for row in csv.DictReader(lines):
        yield row["metric"], int(row["step"]), float(row["value"])


def _jsonl_points(lines: Iterable[str]) -> Iterable[tuple[str, int, float]]:
    for line in filter(str.strip, lines):
        metrics = json.loads(line)
        step = int(metrics.pop("step"))
        yield from ((metric, step, float(value)) for metric, value in metrics.items())
