"""How well the learned causal layer recovers the graph.

Strengths (K, K) are at least 0, such as the block norms that `strengths()` of a causal form gives; of a module with
hidden factors, those between the concepts, `strengths[:K, :K]`. The adjacency (K, K) is boolean. In both, row =
effect and column = cause, as in `quad.edge_matrix`, and the diagonal is left out of account.
"""

from __future__ import annotations

import numpy as np


def edge_auroc(strengths: np.ndarray, adjacency: np.ndarray) -> float:
    """Area under the ROC curve of the strengths as scores of "is an edge"; higher is better.

    It is the probability that a true edge is stronger than a pair without an edge, ties counting half (Hanley and
    McNeil, 1982), in [0, 1]: 1 is perfect, 0.5 is chance, below 0.5 edges point the wrong way. It needs no threshold.
    Block norms are only as comparable as the scales of the nodes are; standardize these first if they differ.

    Args:
        strengths: strengths (K, K).
        adjacency: the true graph (K, K).

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if these are not such matrices, or if the graph has no edge or no pair without one.
    """
    _check(strengths, adjacency)
    pairs = ~np.eye(len(strengths), dtype=bool)
    edges, others = int((pairs & adjacency).sum()), int((pairs & ~adjacency).sum())
    if not edges or not others:
        raise ValueError(f"The graph has {edges} edges and {others} ordered pairs without one; the AUROC needs both.")
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("The AUROC needs scikit-learn; run `pip install scikit-learn`.") from error
    return float(roc_auc_score(adjacency[pairs], strengths[pairs]))


def structural_hamming_distance(strengths: np.ndarray, adjacency: np.ndarray, threshold: float) -> int:
    """How many edges must be added, removed or reversed to turn the learned graph into the true one; lower is better.

    A learned edge is a strength above the threshold. A reversed edge counts once (Tsamardinos et al., 2006, "The
    max-min hill-climbing Bayesian network structure learning algorithm"). It lies between 0 and K(K - 1); a learned
    graph without edges is at the number of true edges. Choose the threshold without a look at the true graph: the one
    that is best for it is an oracle's.

    Args:
        strengths: strengths (K, K).
        adjacency: the true graph (K, K).
        threshold: at least 0.

    Raises:
        ValueError: if these are not such matrices, or if the threshold is negative.
    """
    _check(strengths, adjacency)
    if not threshold >= 0:
        raise ValueError(f"`threshold` is {threshold}; it must be at least 0, as strengths are.")
    learned = strengths > threshold
    wrong = (learned != adjacency) & ~np.eye(len(strengths), dtype=bool)
    reversed_edges = wrong & wrong.T & learned & ~learned.T
    return int(wrong.sum() - reversed_edges.sum())


def _check(strengths: np.ndarray, adjacency: np.ndarray) -> None:
    shape = strengths.shape
    if len(shape) != 2 or shape[0] != shape[1] or adjacency.shape != shape or adjacency.dtype != bool:
        raise ValueError(
            f"Got strengths {shape} and an adjacency {adjacency.shape} of type {adjacency.dtype}; give two (K, K) "
            "matrices, the adjacency boolean."
        )
    if not (strengths >= 0).all():
        raise ValueError("A strength is negative or not a number; give norms, such as `strengths()` of a causal form.")
