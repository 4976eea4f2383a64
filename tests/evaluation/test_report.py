import re

import numpy as np
import pytest

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    bootstrap_interval,
    kernel_distance,
    sliced_wasserstein_distance,
)
from diffusers_ctx.evaluation.report import (
    measure_context,
    measure_counterfactuals,
    render_markdown,
    summarize,
)


def mean_colors(images):
    return images.mean(axis=(1, 2)) / 255


@pytest.fixture(scope="module")
def sets() -> dict[str, np.ndarray]:
    """Images of two distributions, and real ones twice."""
    distributions = {"same": ((), 41), "other": (("quad4",), 42), "real": ((), 43), "real_b": ((), 44)}
    return {name: quad.generate(context, n=200, seed=seed).images for name, (context, seed) in distributions.items()}


def test_a_report_has_the_metrics_of_its_images(sets):
    metrics = measure_context(sets["other"], sets["real"], sets["real_b"], mean_colors, seed=3)
    distance = sliced_wasserstein_distance(sets["other"], sets["real"], seed=3)
    floor = sliced_wasserstein_distance(sets["real_b"], sets["real"], seed=3)
    assert metrics["n"] == 200 and (metrics["swd"], metrics["floor"]) == (distance, floor)
    assert metrics["debiased"] ** 2 == pytest.approx(distance**2 - floor**2)
    assert tuple(metrics["interval"]) == bootstrap_interval(sets["other"], sets["real"], seed=3)
    colors = {name: mean_colors(images) for name, images in sets.items()}
    assert (metrics["kid"], metrics["kid_error"]) == kernel_distance(colors["other"], colors["real"], 100, 100, 3)
    assert metrics["kid_floor"] == kernel_distance(colors["real_b"], colors["real"], 100, 100, 3)[0]


def test_metrics_tell_the_right_distribution_from_a_wrong_one(sets):
    right, wrong = (
        measure_context(sets[name], sets["real"], sets["real_b"], mean_colors) for name in ("same", "other")
    )
    assert right["interval"][0] < right["floor"] < right["interval"][1] and right["debiased"] < 0.05
    assert wrong["interval"][0] > 2 * wrong["floor"] and wrong["debiased"] > 0.2
    assert wrong["kid"] > 5 * max(abs(right["kid"]), abs(right["kid_floor"]))


def test_without_features_there_is_no_kernel_distance(sets):
    metrics = measure_context(sets["same"], sets["real"], sets["real_b"])
    assert metrics.keys() == {"n", "swd", "interval", "floor", "debiased"}


@pytest.mark.parametrize("sizes", [(5, 5, 6), (5, 6, 6), (1, 1, 1)])
def test_sets_of_different_sizes(sets, sizes):
    names = ("same", "real", "real_b")
    with pytest.raises(ValueError, match=rf"{sizes[0]} samples, {sizes[1]} and {sizes[2]} real images; give as many"):
        measure_context(*(sets[name][:size] for name, size in zip(names, sizes)))


def test_means_are_over_their_own_contexts():
    interventions = {"obs": (), "a": ("a",), "b": ("b",), "a+b": ("a", "b"), "a+b+c": ("a", "b", "c")}
    values = dict(zip(interventions, (9.0, 0.1, 0.2, 0.4, 0.8)))
    metrics = {
        name: {"n": 5, "swd": value, "floor": value / 2, "debiased": value / 4, "interval": [0, 1]}
        for name, value in values.items()
    }
    summary = summarize(metrics, interventions)
    assert summary["concept"] == pytest.approx(
        {"contexts": 2, "told": 0, "swd": 0.15, "floor": 0.075, "debiased": 0.0375}
    )
    assert summary["composition"] == pytest.approx(
        {"contexts": 2, "told": 0, "swd": 0.6, "floor": 0.3, "debiased": 0.15}
    )
    assert summary["gap"] == pytest.approx(0.15 - 0.0375)
    assert summarize({"obs": metrics["obs"], "a": metrics["a"]}, interventions).keys() == {"concept"}


def test_axioms_are_distances_to_the_images():
    images = np.full((3, 2, 2, 3), 100, dtype=np.uint8)
    measured = measure_counterfactuals(
        images, {0: images, 10: images + 51}, {"a": (images + 102, images), "b": (images, images - 51)}
    )
    assert measured["n"] == 3
    assert measured["composition"] == pytest.approx({0: 0, 10: 0.2})
    assert measured["change"] == pytest.approx({"a": 0.4, "b": 0})
    assert measured["reversibility"] == pytest.approx({"a": 0, "b": 0.2})


def cells_of(markdown: str) -> list[list[str]]:
    rows = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


RESULTS = {
    "contexts": {
        "obs": {"n": 20, "swd": 0.1234, "floor": 0.1, "debiased": 0.07, "interval": [0.11, 0.14], "kid": -0.0004,
                "kid_error": 0.001, "kid_floor": 0.0006},
        "night": {"n": 7, "swd": 0.2, "floor": 0.1, "debiased": 0.173, "interval": [0.11, 0.3], "kid": 2.0,
                  "kid_error": 0.1, "kid_floor": 0.0},
    },
    "concept": {"contexts": 1, "swd": 0.2, "floor": 0.1, "debiased": 0.173, "kid": 2.0, "kid_floor": 0.0},
}  # fmt: skip


def test_the_table_has_a_row_per_context_and_mean():
    assert cells_of(render_markdown(RESULTS)) == [
        ["context", "n", "SWD", "95 % interval", "real vs real", "debiased", "KID", "KID, real vs real"],
        ["obs", "20", "0.123", "0.110 to 0.140", "0.100", "0.070", "-0.000", "0.001"],
        ["night", "7", "0.200", "0.110 to 0.300", "0.100", "0.173", "2.000", "0.000"],
        ["mean of 1, concept", "", "0.200", "", "0.100", "0.173", "2.000", "0.000"],
    ]


def test_a_context_called_as_a_mean_keeps_its_row():
    night = RESULTS["contexts"]["night"]
    names = ["obs", "mean of 1, concept", "concept", "mean"]
    results = RESULTS | {"contexts": dict.fromkeys(names, night)}
    assert [row[0] for row in cells_of(render_markdown(results))] == ["context", *names, "mean of 1, concept"]


def test_the_lines_of_the_table_are_as_long_as_one_another():
    lines = [line for line in render_markdown(RESULTS).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and re.fullmatch(r"\|-+\|(-+:\|)+", lines[1])


def test_what_was_not_measured_is_not_in_the_table():
    contexts = {"obs": {"n": 2, "swd": 0.1, "floor": 0.1, "debiased": 0.0, "interval": [0.0, 0.2]}}
    markdown = render_markdown({"contexts": contexts})
    assert cells_of(markdown)[0][-1] == "debiased" and "Counterfactuals" not in markdown and "gap" not in markdown


def test_a_distance_whose_interval_reaches_the_baseline_cannot_be_told():
    far = {"n": 20, "swd": 0.3, "floor": 0.1, "debiased": 0.283, "interval": [0.2, 0.4]}
    near = {"n": 20, "swd": 0.1, "floor": 0.1, "debiased": 0.0, "interval": [0.05, 0.15]}
    below = {"n": 20, "swd": 0.05, "floor": 0.1, "debiased": 0.0, "interval": [0.02, 0.08]}
    interventions = {"obs": [], "night": ["night"], "snow": ["snow"], "both": ["night", "snow"]}
    contexts = {"obs": far, "night": near, "snow": below, "both": far}
    summary = summarize(contexts, interventions)
    assert summary["concept"]["told"] == 0 and summary["composition"]["told"] == 1
    markdown = render_markdown({"contexts": contexts} | summary)
    cells = {row[0]: row[-1] for row in cells_of(markdown)[1:]}
    assert cells["obs"] == cells["both"] == cells["mean of 1, composition"] == "0.283"
    assert cells["night"] == cells["snow"] == cells["mean of 2, concept"] == "inconclusive"
    assert "Composition gap of the debiased SWD: inconclusive" in markdown
    contexts["snow"] = far
    summary = summarize(contexts, interventions)
    assert summary["gap"] == pytest.approx(0.283 - 0.283 / 2)
    assert f"Composition gap of the debiased SWD: {summary['gap']:.3f}" in render_markdown(
        {"contexts": contexts} | summary
    )


def test_counterfactuals_have_tables_of_their_own():
    measured = {"n": 4, "composition": {0: 0.01, 10: 0.05}, "change": {"night": 0.3}, "reversibility": {"night": 0.02}}
    markdown = render_markdown(RESULTS | {"counterfactuals": measured, "gap": 0.0321})
    assert "gap of the debiased SWD: 0.032" in markdown and "Counterfactuals of 4 observational images" in markdown
    assert cells_of(markdown)[4:] == [
        ["rounds without intervention", "error"],
        ["0", "0.0100"],
        ["10", "0.0500"],
        ["intervention", "error when undone", "change when made"],
        ["night", "0.0200", "0.3000"],
    ]
