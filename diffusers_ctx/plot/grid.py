"""Grids of images with names of rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .labels import printable
from .libraries import new_figure
from .pictures import as_pixels, show


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LETTER = 0.09  # inches, of a label beside a row


def image_grid(
    rows: Sequence[Sequence[Any]],
    row_names: Sequence[str] | None = None,
    column_names: Sequence[str] | None = None,
    title: str | None = None,
    size: float = 1.2,
) -> Figure:
    """Rows of images, such as a context per row and a seed per column.

    Args:
        rows: images of each row, PIL images or arrays (H, W, 3), uint8, or float in [0, 1]. Rows may differ in length.
        row_names: a name for each row, on its left.
        column_names: a name for each column, above it.
        title: a line above all.
        size: width and height of an image, in inches.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no image, or the names do not fit the images.
    """
    columns = max(map(len, rows), default=0)
    if not columns:
        raise ValueError("There are no images to draw; give at least one row with one.")
    for names, count, what in ((row_names, len(rows), "row"), (column_names, columns, "column")):
        if names is not None and len(names) != count:
            raise ValueError(f"`{what}_names` has {len(names)} names for {count} {what}s; give one each.")
    beside = _LETTER * max((len(line) for name in row_names or () for line in name.split("\n")), default=0)
    above = 0.25 * bool(column_names) + 0.3 * bool(title)
    figure = new_figure(size * columns + beside, size * len(rows) + above, w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, images in zip(axes, rows):
        for place in row[len(images) :]:
            place.set_axis_off()
        for place, image in zip(row, images):
            show(place, as_pixels(image))
    for place, name in zip(axes[:, 0], row_names or ()):
        place.set_ylabel(_label(name), rotation=0, ha="right", va="center", parse_math=False)
    for place, name in zip(axes[0], column_names or ()):
        place.set_title(_label(name), fontsize="medium", parse_math=False)
    if title:
        figure.suptitle(_label(title), parse_math=False)
    return figure


def strength_strip(images: Sequence[Any], strengths: Sequence[float], concept: str, size: float = 1.2) -> Figure:
    """One image under rising strengths of one concept, all else being equal.

    Args:
        images: an image for each strength, see [`image_grid`].
        strengths: strengths of the intervention, in [0, 1].
        concept: the concept's name.
        size: width and height of an image, in inches.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is not one image for each strength.
    """
    if len(images) != len(strengths):
        raise ValueError(f"There are {len(images)} images for {len(strengths)} strengths; give one each.")
    return image_grid([images], [concept], [f"{strength:g}" for strength in strengths], size=size)


def _label(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))
