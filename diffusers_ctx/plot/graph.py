"""The learned graph, drawn as one: an arrow from each cause to its effect, the wider the stronger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .labels import printable
from .libraries import new_figure, require
from .pictures import as_numbers


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDEST = 6.0  # points, of the strongest edge
_FOUND, _WRONG, _CUT = "C0", "C3", "0.75"
_INTERVENED, _LIT = "#f5a623", "#fde9c4"


def causal_graph(
    strengths: np.ndarray,
    nodes: Sequence[str],
    true_edges: Sequence[tuple[str, str]] | None = None,
    threshold: float = 0.1,
    intervened: Sequence[str] = (),
) -> Figure:
    """A learned graph, and the true one beside it, where that is known.

    Edges that the true graph lacks are red. Nodes that are intervened on are orange, and what they cause is light
    orange; the edges into them, which the intervention cuts, are dotted. Nodes are on a circle, where none hides an
    edge; counterclockwise from the right, they are in causal order, if the true graph, or else the learned one, has no
    cycle.

    Args:
        strengths: strengths (N, N) of the edges, row = effect, column = cause, see `ContextModule.causal.strengths`.
        nodes: names of the N nodes.
        true_edges: edges (cause, effect) of the true graph.
        threshold: edges below this share of the strongest one are not drawn.
        intervened: nodes that are intervened on.

    Raises:
        ImportError: if matplotlib or networkx is not installed.
        ValueError: if the strengths are not of the shape (N, N), are negative or not finite, or a true edge or
            `intervened` names no node.
    """
    learned = _edges(strengths, nodes, threshold)
    if unknown := sorted({name for edge in true_edges or () for name in edge} - set(nodes)):
        raise ValueError(f"`true_edges` names {unknown}; the nodes are {list(nodes)}.")
    graphs: dict[str, dict[tuple[str, str], float]] = {"learned": learned}
    if true_edges is not None:
        graphs["true"] = dict.fromkeys(map(tuple, true_edges), 0.4)  # type: ignore[arg-type]
    places = _layout(nodes, list(graphs.get("true", learned)))
    figure = new_figure(4.8 * len(graphs), 4.4)
    for axes, (title, edges) in zip(np.atleast_1d(figure.subplots(1, len(graphs))), graphs.items()):
        colors = {edge: _WRONG if true_edges is not None and edge not in graphs["true"] else _FOUND for edge in edges}
        fills = dict.fromkeys(_caused(edges, nodes, intervened), _LIT) | dict.fromkeys(intervened, _INTERVENED)
        _draw(axes, nodes, edges, colors, places, fills)
        axes.set_title(title if true_edges is not None else "")
    return figure


def effects(
    strengths: np.ndarray, nodes: Sequence[str], intervened: Sequence[str], threshold: float = 0.1
) -> list[str]:
    """The nodes that interventions change, directly or through others, in the order of `nodes`.

    Those intervened on are not among them: under the intervention, nothing else causes them.

    Args:
        strengths: as for [`causal_graph`], which lights the same nodes.
        nodes: names of the N nodes.
        intervened: nodes that are intervened on.
        threshold: edges below this share of the strongest one do not count.

    Raises:
        ImportError, ValueError: as [`causal_graph`].
    """
    return _caused(_edges(strengths, nodes, threshold), nodes, intervened)


def _edges(strengths: np.ndarray, nodes: Sequence[str], threshold: float) -> dict[tuple[str, str], float]:
    """Strengths, as shares of the strongest, of the edges (cause, effect) that are not too weak."""
    strengths = as_numbers(strengths)
    if strengths.shape != (len(nodes), len(nodes)) or not (strengths >= 0).all() or not np.isfinite(strengths).all():
        raise ValueError(
            f"`strengths` has the shape {strengths.shape} for {len(nodes)} nodes; give numbers of 0 or more, one for"
            " each pair of nodes."
        )
    strongest = strengths.max(initial=0)
    kept = np.argwhere((strengths > 0) & (strengths >= threshold * strongest))
    return {(nodes[cause], nodes[effect]): strengths[effect, cause] / strongest for effect, cause in kept}


def _caused(edges: Iterable[tuple[str, str]], nodes: Sequence[str], intervened: Sequence[str]) -> list[str]:
    if unknown := sorted(set(intervened) - set(nodes)):
        raise ValueError(f"`intervened` names {unknown}; the nodes are {list(nodes)}.")
    graph = _directed(nodes, [edge for edge in edges if edge[1] not in intervened])
    reached = {effect for name in intervened for effect in require("networkx").descendants(graph, name)}
    return [name for name in nodes if name in reached]


def _layout(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    networkx = require("networkx")
    graph = _directed(nodes, edges)
    if networkx.is_directed_acyclic_graph(graph):
        graph = _directed(list(networkx.topological_sort(graph)), [])
    return networkx.circular_layout(graph)


def _directed(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Any:
    graph = require("networkx").DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


def _draw(
    axes: Axes,
    nodes: Sequence[str],
    edges: dict[tuple[str, str], float],
    colors: dict[tuple[str, str], str],
    places: dict[str, Any],
    fills: dict[str, str],
) -> None:
    networkx = require("networkx")
    graph = _directed(nodes, list(edges))
    size = 2400
    networkx.draw_networkx_nodes(
        graph,
        places,
        ax=axes,
        node_size=size,
        node_color=[fills.get(node, "white") for node in nodes],
        edgecolors="black",
    )
    labels = {node: printable(node) for node in nodes}
    networkx.draw_networkx_labels(graph, places, labels, ax=axes, font_size=8)
    for edge, strength in edges.items():
        is_cut = fills.get(edge[1]) == _INTERVENED
        networkx.draw_networkx_edges(
            graph,
            places,
            [edge],
            ax=axes,
            width=max(0.5, _WIDEST * strength),
            edge_color=_CUT if is_cut else colors[edge],
            style="dotted" if is_cut else "solid",
            node_size=size,
            arrowsize=12 + 8 * strength,
            connectionstyle="arc3,rad=0.12",
            alpha=0.85,
        )
    axes.margins(0.2)
    axes.set_axis_off()
