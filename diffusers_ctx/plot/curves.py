"""Curves of what a training logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .labels import printable
from .libraries import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_SMOOTHED = 100  # values; a curve of more is drawn pale, and its running mean over it


def training_curves(log: Mapping[str, Mapping[int, float]], metrics: Sequence[str] | None = None) -> Figure:
    """Metrics over steps. Metrics of one kind, such as the KL of every concept (`concepts/kl/<concept>`), share axes.

    Args:
        log: values of each metric by step, see [`read_training_log`].
        metrics: beginnings of names of metrics to draw, such as `concepts/kl` and `loss`; by default all are drawn.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the log has no such metric.
    """
    panels: dict[str, list[str]] = {}
    for name in log:
        if metrics is None or any(name == start or name.startswith(f"{start}/") for start in metrics):
            panels.setdefault(_panel(name), []).append(name)
    if not panels:
        raise ValueError(f"The log has none of {list(metrics or ())}; it has {sorted(log)}.")
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4 * columns, 2.7 * rows)
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, names) in zip(places, panels.items()):
        for name in names:
            _draw(axes, log[name], label=printable(name.removeprefix(f"{title}/")))
        axes.set_title(printable(title), fontsize="medium", parse_math=False)
        axes.set_xlabel("step of the concept stage" if title.startswith("concepts/") else "step")
        if len(names) > 1:
            axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))  # on no curve
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return figure


def _panel(name: str) -> str:
    """What a metric shares axes with: `concepts/kl` for `concepts/kl/night`."""
    stage, _, rest = name.partition("/")
    if stage == "concepts":
        return f"{stage}/{rest.partition('/')[0]}"
    return stage


def _draw(axes, values: Mapping[int, float], label: str) -> None:
    steps, heights = np.array(list(values), dtype=float), np.array(list(values.values()), dtype=float)
    if len(steps) <= _SMOOTHED:
        axes.plot(steps, heights, label=label, marker="o" if len(steps) == 1 else None)
        return
    width = len(steps) // 50
    pale = axes.plot(steps, heights, alpha=0.25, linewidth=0.8)[0]
    mean = np.convolve(heights, np.full(width, 1 / width), mode="valid")
    axes.plot(steps[width - 1 :], mean, color=pale.get_color(), label=label)
