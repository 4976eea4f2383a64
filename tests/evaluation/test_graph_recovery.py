import itertools

import numpy as np
import pytest
import torch

from diffusers_ctx.context.causal import Structural
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import edge_auroc, structural_hamming_distance


CHAIN = np.zeros((3, 3), dtype=bool)  # 0 -> 1 -> 2; row = effect
CHAIN[1, 0] = CHAIN[2, 1] = True


def random_graph(size, seed):
    rng = np.random.default_rng(seed)
    strengths = rng.integers(0, 5, (size, size)) / 4  # with ties
    return strengths, rng.random((size, size)) < 0.3


def graph(*edges, size=3):
    strengths = np.zeros((size, size))
    for cause, effect in edges:
        strengths[effect, cause] = 1
    return strengths


@pytest.mark.parametrize("seed", range(5))
def test_auroc_equals_a_count_of_pairs(seed):
    strengths, adjacency = random_graph(6, seed)
    cells = [cell for cell in itertools.product(range(6), repeat=2) if cell[0] != cell[1]]
    edges = [strengths[cell] for cell in cells if adjacency[cell]]
    others = [strengths[cell] for cell in cells if not adjacency[cell]]
    wins = [(edge > other) + 0.5 * (edge == other) for edge in edges for other in others]
    assert edge_auroc(strengths, adjacency) == pytest.approx(np.mean(wins), rel=1e-12)


def test_auroc_of_perfect_constant_and_inverted_strengths():
    assert edge_auroc(0.1 + CHAIN, CHAIN) == 1
    assert edge_auroc(np.ones((3, 3)), CHAIN) == 0.5
    assert edge_auroc(1.0 - CHAIN, CHAIN) == 0
    assert edge_auroc(np.where(np.eye(3), 100, CHAIN), CHAIN) == 1  # the diagonal does not count


def test_reads_a_causal_layer_the_right_way_round():
    adjacency = quad.edge_matrix() != 0
    layer = Structural(num_concepts=8, num_hidden_factors=0, dim=2)
    with torch.no_grad():
        layer.blocks.copy_(torch.from_numpy(quad.edge_matrix())[:, :, None, None] * torch.ones(2, 2))
    strengths = layer.strengths().detach().numpy()
    assert edge_auroc(strengths, adjacency) == 1
    assert edge_auroc(strengths, adjacency.T) < 0.5
    assert structural_hamming_distance(strengths, adjacency, 0.1) == 0
    assert structural_hamming_distance(strengths, adjacency.T, 0.1) == len(quad.EDGES)  # each reversed


@pytest.mark.parametrize(
    "learned, distance",
    [
        (graph((0, 1), (1, 2)), 0),
        (graph(), 2),
        (graph((0, 1)), 1),
        (graph((0, 1), (2, 1)), 1),  # one reversed
        (graph((1, 0), (2, 1)), 2),  # both reversed
        (graph((0, 1), (1, 2), (0, 2)), 1),
        (graph((0, 1), (1, 0), (1, 2)), 1),  # both directions of an edge
        (graph((0, 1), (1, 2), (0, 2), (2, 0)), 2),  # both directions of none
        (graph((1, 0), (0, 2)), 3),  # one reversed, one missing, one added
        (graph((0, 1), (1, 2)) + np.eye(3), 0),
        (np.ones((3, 3)), 4),
    ],
)
def test_hamming_distance_by_hand(learned, distance):
    assert structural_hamming_distance(learned, CHAIN, 0.5) == distance


@pytest.mark.parametrize("seed", range(5))
def test_hamming_distance_is_the_least_number_of_steps_for_each_pair(seed):
    strengths, adjacency = random_graph(6, seed)
    steps = {(p, q): abs(p[0] - q[0]) + abs(p[1] - q[1]) for p in np.ndindex(2, 2) for q in np.ndindex(2, 2)}
    steps[(0, 1), (1, 0)] = steps[(1, 0), (0, 1)] = 1
    learned = strengths > 0.5
    total = 0
    for i, j in itertools.combinations(range(6), 2):
        total += steps[
            tuple(int(g) for g in (learned[i, j], learned[j, i])), (int(adjacency[i, j]), int(adjacency[j, i]))
        ]
    assert structural_hamming_distance(strengths, adjacency, 0.5) == total


def test_a_strength_at_the_threshold_is_no_edge():
    assert structural_hamming_distance(graph((0, 1), (1, 2)), CHAIN, 1) == 2
    assert structural_hamming_distance(graph((0, 1), (1, 2)), CHAIN, 0) == 0


@pytest.mark.parametrize(
    "strengths, adjacency, message",
    [
        (np.ones((3, 2)), CHAIN, r"strengths \(3, 2\)"),
        (np.ones((2, 2)), CHAIN, r"an adjacency \(3, 3\)"),
        (np.ones((3, 3)), CHAIN.astype(float), "of type float64"),
        (-np.ones((3, 3)), CHAIN, "negative"),
        (np.full((3, 3), np.nan), CHAIN, "not a number"),
    ],
)
def test_matrices_that_are_no_graphs(strengths, adjacency, message):
    with pytest.raises(ValueError, match=message):
        edge_auroc(strengths, adjacency)
    with pytest.raises(ValueError, match=message):
        structural_hamming_distance(strengths, adjacency, 0.5)


def test_what_has_no_answer():
    with pytest.raises(ValueError, match="0 edges and 6"):
        edge_auroc(np.ones((3, 3)), np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="6 edges and 0"):
        edge_auroc(np.ones((3, 3)), ~np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match="`threshold` is -1"):
        structural_hamming_distance(np.ones((3, 3)), CHAIN, -1)
