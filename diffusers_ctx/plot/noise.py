"""The exogenous noise of images, beside the prior that it is to follow in every context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import printable
from .libraries import new_figure
from .pictures import as_numbers


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4
_EDGES = np.linspace(-4, 4, 33)


def exogenous_noise(noise: Mapping[str, Any], nodes: Sequence[str], dimension: int = 0) -> Figure:
    """Histograms of each node's noise, one for each context, and the standard normal density that is its prior.

    Where a histogram differs from the density, or contexts differ, the posterior and the mechanisms do not explain the
    images. Values beyond 4 are counted in the outermost bins.

    Args:
        noise: noise (B, N, d_z) of the images of each context, by the context's name: what
            `pipe.infer_exogenous_noise` returns for images with the context's `factual_interventions`.
        nodes: names of the N nodes, `pipe.context_module.node_names`.
        dimension: which of the d_z numbers of each node to draw.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no context, or the noise is not of the shape (B, N, d_z).
    """
    arrays = {name: as_numbers(values) for name, values in noise.items()}
    if not arrays:
        raise ValueError("There is no noise to draw; give that of at least one context.")
    for name, values in arrays.items():
        if values.ndim != 3 or values.shape[1] != len(nodes) or not -1 < dimension < values.shape[2]:
            raise ValueError(
                f"The noise of {name!r} has the shape {values.shape}; give (B, {len(nodes)}, d_z), with d_z above"
                f" {dimension}."
            )
    columns = min(_COLUMNS, len(nodes))
    rows = math.ceil(len(nodes) / columns)
    figure = new_figure(2.8 * columns, 2.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    middles = (_EDGES[1:] + _EDGES[:-1]) / 2
    for index, (axes, node) in enumerate(zip(grid.flat, nodes)):
        axes.fill_between(middles, np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi), color="0.85", label="prior")
        for name, values in arrays.items():
            inside = values[:, index, dimension].clip(_EDGES[0], _EDGES[-1])
            axes.stairs(np.histogram(inside, _EDGES, density=True)[0], _EDGES, label=printable(name))
        axes.set_title(printable(node), fontsize="medium", parse_math=False)
    for axes in list(grid.flat)[len(nodes) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[len(nodes) - columns : len(nodes)]:  # nothing below them has the labels
        axes.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize="small")
    return figure
