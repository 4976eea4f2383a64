"""Figures as pictures."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

import PIL.Image


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODE_RADIUS = 35
"""Pixels, of a node on the picture of a `plot.causal_graph`."""


def as_picture(figure: Figure) -> PIL.Image.Image:
    """A figure as `savefig` writes it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return PIL.Image.open(buffer)


def node_places(graph: Figure) -> list[tuple[float, float]]:
    """Where the nodes of a `plot.causal_graph` are on its picture: pixels from the left, and from the top."""
    graph.draw_without_rendering()
    (axes,) = graph.axes
    labels = axes.transData.transform([label.get_position() for label in axes.texts])  # in the middle of each node
    return [(float(x), graph.bbox.height - float(y)) for x, y in labels]
