"""What trackers log, on two axes: steps of the concept stage, and optimizer steps of the adapter.

Trackers take both as they come, but for W&B, whose steps cannot begin again at zero: there, the axes are metrics of
their own, which the others are drawn over.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker


_CONCEPTS = "concepts/"
_CONCEPT_STEP = f"{_CONCEPTS}step"
_STEP = "step"
_OVER_STEPS = ("loss", "lr", "gradient_norm", "validation", "mean_validation_loss", "validation_loss/*")


def start_trackers(accelerator: Accelerator, options: dict[str, Any]) -> None:
    """Starts the trackers of a run with these options.

    Raises:
        RuntimeError: if one refuses, such as W&B where nobody is logged in.
    """
    try:
        accelerator.init_trackers("context-adapter", config=options)
    except Exception as error:  # each raises errors of its own
        raise RuntimeError(
            f"`report_to` cannot be followed ({error}): log in to the tracker, or choose another one, or `none`."
        ) from error
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and accelerator.is_main_process:
            tracker.tracker.define_metric(f"{_CONCEPTS}*", step_metric=_CONCEPT_STEP)
            for name in _OVER_STEPS:
                tracker.tracker.define_metric(name, step_metric=_STEP)


def track(tracker: GeneralTracker, metrics: dict[str, Any], step: int) -> None:
    """Logs metrics, or pictures in the tracker's own format, of an optimizer step to one tracker."""
    _track(tracker, metrics, _STEP, step)


def track_step(accelerator: Accelerator, metrics: dict[str, float], step: int) -> None:
    """Logs metrics of an optimizer step to all trackers."""
    for tracker in accelerator.trackers:
        track(tracker, metrics, step)


def track_concepts(accelerator: Accelerator, metrics: dict[str, float], step: int) -> None:
    """Logs metrics of a step of the concept stage to all trackers, under names that begin with `concepts/`."""
    for tracker in accelerator.trackers:
        _track(tracker, {f"{_CONCEPTS}{name}": metric for name, metric in metrics.items()}, _CONCEPT_STEP, step)


def _track(tracker: GeneralTracker, metrics: dict[str, Any], axis: str, step: int) -> None:
    if tracker.name == "wandb":
        tracker.log(metrics | {axis: step})
    else:
        tracker.log(metrics, step=step)
