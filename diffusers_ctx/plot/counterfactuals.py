"""Images beside what they would have been, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import printable
from .libraries import new_figure
from .pictures import as_pixels, show


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def counterfactuals(
    factual: Sequence[Any],
    counterfactual: Sequence[Any],
    names: Sequence[str] | None = None,
    intervention: str = "counterfactual",
    size: float = 1.8,
) -> Figure:
    """A row for each image: itself, its counterfactual, and the difference of the two.

    The difference is the mean over the channels of `|counterfactual - factual|`, in [0, 1]. All rows share its scale,
    which ends at the largest difference.

    Args:
        factual: images, PIL images or arrays (H, W, 3), uint8, or float in [0, 1].
        counterfactual: the counterfactual of each, of the same size.
        names: a name for each row.
        intervention: names the second column, such as `do(night)`.
        size: width and height of an image, in inches.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the images do not fit one another, or there are none.
    """
    before, after = list(map(as_pixels, factual)), list(map(as_pixels, counterfactual))
    shapes = [[image.shape for image in images] for images in (before, after)]
    if not before or shapes[0] != shapes[1]:
        raise ValueError(
            f"The images have the shapes {shapes[0]}, and their counterfactuals {shapes[1]}; give the same, at least"
            " one."
        )
    differences = [np.abs(b - a).mean(axis=2) for a, b in zip(before, after)]
    largest = max(float(difference.max()) for difference in differences) or 1.0
    figure = new_figure(3 * size + 0.9, size * len(before) + 0.3)
    axes = figure.subplots(len(before), 3, squeeze=False)
    for row, images in zip(axes, zip(before, after)):
        for place, image in zip(row, images):
            show(place, image)
    maps = [show(row[2], difference, cmap="magma", vmin=0, vmax=largest) for row, difference in zip(axes, differences)]
    for place, title in zip(axes[0], ("factual", intervention, "difference")):
        place.set_title(printable(title), fontsize="medium", parse_math=False)
    for place, name in zip(axes[:, 0], names or ()):
        place.set_ylabel(printable(name), parse_math=False)
    figure.colorbar(maps[0], ax=axes[:, 2].tolist(), label="mean |difference|", shrink=0.9)
    return figure
