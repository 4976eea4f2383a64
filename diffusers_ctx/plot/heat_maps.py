"""Matrices as heat maps: what interventions move, and how strongly concepts cause one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .labels import printable
from .libraries import new_figure
from .pictures import as_numbers


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_maps(
    matrices: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str,
    ylabel: str,
    largest: float | None = None,
    scale_label: str = "",
    size: tuple[float, float] = (3.2, 3.4),
) -> Figure:
    """Matrices of the same rows and columns side by side, on one scale that begins at 0.

    Args:
        matrices: matrices (R, C) by title; NaN is left blank.
        rows: names of the R rows.
        columns: names of the C columns.
        xlabel: what the columns are.
        ylabel: what the rows are.
        largest: end of the scale; by default the largest entry.
        scale_label: what the scale measures.
        size: width and height of each heat map with its labels, in inches.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there is no matrix, or one is not of the shape (R, C).
    """
    arrays = {title: as_numbers(matrix) for title, matrix in matrices.items()}
    for title, matrix in arrays.items():
        if matrix.shape != (len(rows), len(columns)):
            raise ValueError(
                f"The matrix {title!r} has the shape {matrix.shape}, for {len(rows)} rows and {len(columns)} columns."
            )
    if not arrays:
        raise ValueError("There is no matrix to draw.")
    top = largest or max(
        (float(np.nanmax(matrix)) for matrix in arrays.values() if not np.isnan(matrix).all()), default=0
    )
    figure = new_figure(size[0] * len(arrays), size[1])
    for axes, (title, matrix) in zip(np.atleast_1d(figure.subplots(1, len(arrays))), arrays.items()):
        picture = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=top or 1.0)
        axes.set_xticks(range(len(columns)), list(map(printable, columns)), rotation=90, parse_math=False)
        axes.set_yticks(range(len(rows)), list(map(printable, rows)), parse_math=False)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(printable(title), parse_math=False)
    figure.colorbar(picture, ax=figure.axes, shrink=0.8, label=scale_label)
    return figure


def interference(
    matrices: Mapping[str, np.ndarray], interventions: Sequence[str], attributes: Sequence[str]
) -> Figure:
    """How far each intervention moves each attribute, see [`~evaluation.interference_matrix`].

    Args:
        matrices: matrices (I, A) by title, such as that of an adapter beside the true one.
        interventions: names of the I interventions.
        attributes: names of the A attributes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a matrix is not of the shape (I, A), or there is none.
    """
    return heat_maps(matrices, interventions, attributes, "attribute", "intervention", largest=1.2)


def edge_strengths(matrices: Mapping[str, np.ndarray], nodes: Sequence[str]) -> Figure:
    """The strengths of causal layers as heat maps; [`causal_graph`] draws one as a graph.

    Args:
        matrices: strengths (N, N) by title, row = effect, column = cause.
        nodes: names of the N nodes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a matrix is not of the shape (N, N), or there is none.
    """
    size = 2 + 0.4 * len(nodes)
    return heat_maps(
        matrices, nodes, nodes, "cause", "effect", scale_label="strength of the edge", size=(size + 1, size)
    )
