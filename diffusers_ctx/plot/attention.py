"""Where in an image each concept's tokens act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .labels import printable
from .libraries import new_figure
from .pictures import as_numbers, as_pixels, show


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attention_maps(
    images: Sequence[Any], maps: Any, nodes: Sequence[str], shown: Sequence[str] | None = None, size: float = 1.5
) -> Figure:
    """A row for each image: itself, and for each concept the share of attention that its tokens have, place by place.

    All maps share a scale that begins at 0. They lie over a pale copy of the image.

    Args:
        images: B images, PIL images or arrays (H, W, 3), uint8, or float in [0, 1].
        maps: (B, N, h, w), see [`~adapter.collect_attention`].
        nodes: names of the N nodes, `pipe.context_module.node_names`.
        shown: names of those to draw; by default all.
        size: width and height of an image, in inches.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if maps, images and nodes do not fit one another, or `shown` is empty or names an unknown node.
    """
    values, pixels = as_numbers(maps), [as_pixels(image) for image in images]
    if values.ndim != 4 or values.shape[:2] != (len(pixels), len(nodes)) or not pixels:
        raise ValueError(
            f"The maps have the shape {values.shape}; {len(pixels)} images and {len(nodes)} nodes need"
            f" ({len(pixels)}, {len(nodes)}, h, w), with one image at least."
        )
    shown = list(nodes if shown is None else shown)
    if not shown:
        raise ValueError("`shown` names no node; leave it out to draw all.")
    if unknown := sorted(set(shown) - set(nodes)):
        raise ValueError(f"`shown` names {unknown}; the nodes are {list(nodes)}.")
    chosen = values[:, [list(nodes).index(name) for name in shown]]
    figure = new_figure(size * (1 + len(shown)) + 0.9, size * len(pixels) + 0.3)
    axes = figure.subplots(len(pixels), 1 + len(shown), squeeze=False)
    for row, image, over in zip(axes, pixels, chosen):
        show(row[0], image)
        height, width = image.shape[:2]
        for place, shares in zip(row[1:], over):
            show(place, image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
            heat = show(
                place,
                shares,
                cmap="magma",
                vmin=0,
                vmax=float(chosen.max()),
                alpha=0.75,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            )
    for place, title in zip(axes[0], ("image", *shown)):
        place.set_title(printable(title), fontsize="medium", parse_math=False)
    figure.colorbar(heat, ax=axes.ravel().tolist(), label="share of attention", shrink=0.9)
    return figure
