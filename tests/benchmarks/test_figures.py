"""The benchmark's pictures show the numbers they are made from."""

import json
from pathlib import Path

import numpy as np
import pytest
from figures import draw_errors, draw_graphs, draw_interference

from diffusers_ctx.data import quad


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture(scope="module")
def results() -> list[dict]:
    folder = RESULTS / "quad" / "dependent-seed0-images4000-steps1000"
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("prompt-lora", "ours")]


def matrices_in(figure) -> dict[str, np.ndarray]:
    return {axes.get_title(): axes.get_images()[0].get_array() for axes in figure.axes if axes.images}


def test_matrices_are_beside_the_truth(results):
    names = {
        axes.get_title(): axes.get_images()[0].get_array() for axes in draw_interference(results).axes if axes.images
    }
    assert list(names) == ["truth", "prompt-lora", "ours"]
    np.testing.assert_array_equal(names["ours"], results[1]["interference"]["matrix"])
    np.testing.assert_array_equal(names["truth"], results[0]["interference"]["true_matrix"])

    graphs = matrices_in(draw_graphs(results))
    assert list(graphs) == ["truth", "ours"]  # the other has no graph
    np.testing.assert_array_equal(graphs["ours"], results[1]["graph"]["strengths"])
    edges = {(quad.CONCEPTS[cause], quad.CONCEPTS[effect]) for effect, cause in zip(*np.nonzero(graphs["truth"]))}
    assert edges == {edge for edge in quad.EDGES if set(edge) <= set(quad.CONCEPTS)}


def test_the_best_method_is_on_top_with_its_means(results):
    (axes,) = draw_errors(results).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["prompt-lora", "ours"]  # from below
    pairs = [bar.get_width() for bar in axes.containers[1]]
    contexts = results[1]["contexts"]
    assert pairs[1] == pytest.approx(np.mean([contexts["+".join(pair)]["debiased"] for pair in quad.HELD_OUT_PAIRS]))
    assert pairs[0] > pairs[1]


def test_figures_are_drawn_from_the_results(run_program, tmp_path):
    program = RESULTS.parent / "figures.py"
    folder = RESULTS / "quad" / "independent-seed0-images4000-steps1000"
    options = [
        "--output_dir",
        tmp_path,
        "--methods",
        "ours",
        "--curves",
        RESULTS,
        "--shipped",
        RESULTS / "quad-context.json",
    ]
    run_program(program, folder, *options)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"compositions.png", "errors.png", "interference.png", "graphs.png", "curves.png"}
