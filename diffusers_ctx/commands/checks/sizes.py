"""Numbers and sizes of images."""

from __future__ import annotations

import numpy as np

from .findings import Finding, Problem, Remark
from .images import ImageTable


_IMBALANCE = 4  # times as many images
_SIZE_RATIO = 1.5  # of median sizes


def find_imbalance(table: ImageTable) -> list[Finding]:
    """Contexts with far more images than others."""
    counts = {context: len(table.rows(context)) for context in table.names}
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[most] < _IMBALANCE * counts[fewest]:
        return []
    return [
        Problem(
            "imbalance",
            f"{most!r} has {counts[most]} images, and {fewest!r} has {counts[fewest]}. Training shows each context as"
            f" often as the largest, so it repeats those of {fewest!r} {counts[most] / counts[fewest]:.0f} times as"
            " often, and may learn them by heart.",
            {"counts": counts},
        )
    ]


def find_small_and_unlike_sizes(table: ImageTable, resolution: int | None) -> list[Finding]:
    """Images that would be enlarged, and contexts whose images are larger than others'."""
    shorter = table.sizes.min(axis=1)
    findings: list[Finding] = []
    if resolution is not None and (small := np.flatnonzero(shorter < resolution)).size:
        findings.append(
            Problem(
                "sizes",
                f"{len(small)} of {len(shorter)} images have a side below {resolution} pixels and would be enlarged:"
                f" {table.shown(small[:3])}{' and more' if len(small) > 3 else ''}.",
                {"resolution": resolution, "smaller": len(small)},
            )
        )
    medians = {context: float(np.median(shorter[table.rows(context)])) for context in table.names}
    low, high = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
    if medians[high] >= _SIZE_RATIO * medians[low]:
        findings.append(
            Remark(
                "sizes",
                f"Images of {high!r} are larger (median of the shorter side: {medians[high]:.0f} pixels) than those of"
                f" {low!r} ({medians[low]:.0f}). If scaling makes the latter blurred, the adapter learns that, too.",
                {"medians": medians},
            )
        )
    return findings
