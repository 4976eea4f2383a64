"""Figures show what they are given: values are read back from their axes."""

import builtins
import csv
import json
import sys
import warnings

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from diffusers_ctx import plot
from diffusers_ctx.plot.pictures import as_numbers


RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def shown(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def drawn(figure: Figure, tmp_path) -> np.ndarray:
    """Pixels of the saved figure: layout and letters cause no warning."""
    figure.savefig(tmp_path / "figure.png")
    return np.asarray(Image.open(tmp_path / "figure.png"))


def test_a_grid_has_every_image_at_its_place_under_its_names(tmp_path):
    rows = [PICTURES[:3], [Image.fromarray(PICTURES[3]), PICTURES[4] / 255]]
    figure = plot.image_grid(rows, ["obs", "do(夜, $n$)"], ["seed 0", "seed 1", "seed 2"], "a title")
    grid = np.array(figure.axes).reshape(2, 3)
    for axes, expected in zip(grid.flat[:5], PICTURES):
        np.testing.assert_allclose(shown(axes), expected / 255)
    assert not grid[1, 2].images and not grid[1, 2].axison
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["obs", r"do(\u591c, $n$)"]
    assert [axes.get_title() for axes in grid[0]] == ["seed 0", "seed 1", "seed 2"]
    assert drawn(figure, tmp_path).std() > 10


def test_names_fit_the_grid():
    with pytest.raises(ValueError, match="`row_names` has 2 names for 1 row"):
        plot.image_grid([PICTURES], ["a", "b"])
    with pytest.raises(ValueError, match="no images"):
        plot.image_grid([[]])
    with pytest.raises(ValueError, match="give a PIL image"):
        plot.image_grid([[np.zeros((4, 4, 3), np.int32)]])


def test_a_strip_names_strengths():
    figure = plot.strength_strip(PICTURES[:3], [0, 0.5, 1], "night")
    assert [axes.get_title() for axes in figure.axes] == ["0", "0.5", "1"]
    assert figure.axes[0].get_ylabel() == "night"
    with pytest.raises(ValueError, match="3 images for 2 strengths"):
        plot.strength_strip(PICTURES[:3], [0, 1], "night")


def test_the_difference_map_is_the_mean_absolute_difference_on_one_scale(tmp_path):
    before, after = PICTURES[:2], PICTURES[2:4]
    figure = plot.counterfactuals(list(before), list(after), ["a", "b"], "do(night)")
    rows = np.array(figure.axes[:6]).reshape(2, 3)
    for row, first, second in zip(rows, before, after):
        expected = np.abs(first.astype(int) - second.astype(int)).mean(axis=2) / 255
        np.testing.assert_allclose(shown(row[2]), expected)
    assert rows[0, 2].images[0].get_clim() == rows[1, 2].images[0].get_clim()
    assert [axes.get_title() for axes in rows[0]] == ["factual", "do(night)", "difference"]
    drawn(figure, tmp_path)
    plot.counterfactuals([before[0]], [before[0]])  # no difference at all
    with pytest.raises(ValueError, match="give the same"):
        plot.counterfactuals([before[0]], [after[0][:4]])


def test_attention_lies_over_each_image_on_one_scale(tmp_path):
    maps = torch.rand(2, 3, 4, 4)
    figure = plot.attention_maps(list(PICTURES[:2]), maps, ["night", "snow", "hidden_0"], ["snow", "night"])
    rows = np.array(figure.axes[:6]).reshape(2, 3)
    assert [axes.get_title() for axes in rows[0]] == ["image", "snow", "night"]
    for row, picture, shares in zip(rows, PICTURES, maps.numpy()):
        np.testing.assert_allclose(shown(row[0]), picture / 255)
        for axes, index in zip(row[1:], (1, 0)):
            under, over = axes.images
            np.testing.assert_allclose(under.get_array(), (picture / 255).mean(axis=2))
            np.testing.assert_allclose(over.get_array(), shares[index])
            assert over.get_extent() == list(under.get_extent())
            assert over.get_clim() == (0, pytest.approx(float(maps[:, :2].max())))
    drawn(figure, tmp_path)
    with pytest.raises(ValueError, match=r"1 images and 3 nodes need \(1, 3, h, w\)"):
        plot.attention_maps([PICTURES[0]], maps, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"names \['fog'\]"):
        plot.attention_maps(list(PICTURES[:2]), maps, ["a", "b", "c"], ["fog"])
    with pytest.raises(ValueError, match="`shown` names no node"):
        plot.attention_maps(list(PICTURES[:2]), maps, ["a", "b", "c"], [])


def test_heat_maps_share_a_scale_and_leave_nan_blank(tmp_path):
    matrices = {"a": np.array([[0, 2.0], [0.5, np.nan]]), "b": np.eye(2)}
    figure = plot.heat_maps(matrices, ["r1", "r2"], ["c1", "c2"], "x", "y")
    first, second, _ = figure.axes
    np.testing.assert_array_equal(shown(first), matrices["a"])
    assert first.images[0].get_clim() == second.images[0].get_clim() == (0, 2)
    assert [label.get_text() for label in first.get_xticklabels()] == ["c1", "c2"]
    assert first.yaxis_inverted()  # rows from the top down
    drawn(figure, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), for 1 rows"):
        plot.interference(matrices, ["one"], ["c1", "c2"])


def test_strengths_are_effect_by_cause():
    strengths = np.array([[0, 2.0], [0.5, 0]])
    axes = plot.edge_strengths({"learned": strengths}, ["night", "snow"]).axes[0]
    np.testing.assert_array_equal(shown(axes), strengths)
    assert axes.get_xlabel() == "cause" and axes.get_ylabel() == "effect"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["night", "snow"]


def test_edges_lead_from_cause_to_effect_and_are_as_wide_as_they_are_strong(tmp_path):
    strengths = np.zeros((3, 3))
    strengths[1, 0], strengths[2, 1], strengths[0, 2] = 2.0, 1.0, 0.01  # the last is too weak to be drawn
    figure = plot.causal_graph(strengths, ["a", "b", "c"], true_edges=[("a", "b")])
    learned, true = figure.axes
    assert [learned.get_title(), true.get_title()] == ["learned", "true"]
    found, wrong = learned.patches
    assert found.get_linewidth() == 2 * wrong.get_linewidth()
    assert found.get_edgecolor() != wrong.get_edgecolor()
    places = {text.get_text(): np.array(text.get_position()) for text in learned.texts}
    np.testing.assert_allclose(found._posA_posB, [places["a"], places["b"]])
    np.testing.assert_allclose(wrong._posA_posB, [places["b"], places["c"]])
    assert len(true.patches) == 1
    assert {text.get_text(): text.get_position() for text in true.texts} == {
        name: tuple(place) for name, place in places.items()
    }
    drawn(figure, tmp_path)


def test_interventions_cut_what_causes_them_and_light_what_they_cause():
    strengths = np.zeros((4, 4))
    strengths[1, 0] = strengths[2, 1] = strengths[3, 2] = 1.0  # a -> b -> c -> d
    nodes = ["a", "b", "c", "d"]
    (axes,) = plot.causal_graph(strengths, nodes, intervened=["b"]).axes
    fills = [tuple(color) for color in axes.collections[0].get_facecolor()]
    assert fills[0] == (1, 1, 1, 1) and fills[2] == fills[3] and len({*fills}) == 3
    assert [edge.get_linestyle() for edge in axes.patches] == ["dotted", "solid", "solid"]
    assert plot.effects(strengths, nodes, ["b"]) == ["c", "d"]
    assert plot.effects(strengths, nodes, ["a", "c"]) == ["b", "d"]
    assert plot.effects(strengths, nodes, []) == []
    strengths[0, 3] = 1.0  # a cycle, which the intervention cuts
    assert plot.effects(strengths, nodes, ["b"]) == ["a", "c", "d"]
    for draw in (plot.effects, lambda *given: plot.causal_graph(*given[:2], intervened=given[2])):
        with pytest.raises(ValueError, match=r"`intervened` names \['e'\]"):
            draw(strengths, nodes, ["e"])


def test_tensors_are_numbers_whatever_their_type():
    strengths = torch.tensor([[0, 2.0], [0.5, 0]], dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(as_numbers(strengths), [[0, 2], [0.5, 0]])
    assert len(plot.causal_graph(strengths, ["a", "b"]).axes[0].patches) == 2
    plot.exogenous_noise({"obs": torch.randn(8, 2, 1, dtype=torch.bfloat16)}, ["a", "b"])


def test_graphs_with_cycles_and_without_edges_are_drawn(tmp_path):
    cycle = plot.causal_graph(np.array([[0, 1.0], [1.0, 0]]), ["a", "b"])
    assert len(cycle.axes) == 1 and len(cycle.axes[0].patches) == 2
    drawn(cycle, tmp_path)
    assert not plot.causal_graph(np.zeros((2, 2)), ["a", "b"]).axes[0].patches
    with pytest.raises(ValueError, match=r"names \['c'\]"):
        plot.causal_graph(np.zeros((2, 2)), ["a", "b"], [("a", "c")])
    with pytest.raises(ValueError, match="numbers of 0 or more"):
        plot.causal_graph(-np.eye(2), ["a", "b"])


def test_metrics_of_one_kind_share_axes(tmp_path):
    log = {
        "loss": {step: 1 / step for step in range(1, 500)},
        "concepts/kl/night": {10: 1.0, 20: 2.0},
        "concepts/kl/snow": {10: 3.0, 20: 4.0},
        "validation_loss/obs": {5: 0.5},
        "lr": {1: 0.1},
    }
    figure = plot.training_curves(log, ["loss", "concepts/kl", "validation_loss"])
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "concepts/kl", "validation_loss"]
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels["concepts/kl"].lines}
    assert lines == {"night": [[10, 1], [20, 2]], "snow": [[10, 3], [20, 4]]}
    pale, smooth = panels["loss"].lines
    assert len(pale.get_ydata()) == 499
    width = 499 - len(smooth.get_ydata()) + 1
    assert smooth.get_ydata()[0] == pytest.approx(np.mean([1 / step for step in range(1, width + 1)]))
    assert smooth.get_xdata()[-1] == 499
    drawn(figure, tmp_path)
    assert len([axes for axes in plot.training_curves(log).axes if axes.axison]) == 4
    with pytest.raises(ValueError, match=r"none of \['kl'\]"):
        plot.training_curves(log, ["kl"])


def test_logs_are_read_from_tables_lines_and_events(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    expected = {"loss": {10: 1.0, 20: 0.5}, "concepts/kl/night": {10: 3.0}}
    with (tmp_path / "log.csv").open("w", newline="") as file:
        rows = [(metric, step, value) for metric, values in expected.items() for step, value in values.items()]
        csv.writer(file).writerows([("metric", "step", "value"), *rows])
    lines = [{"step": 10, "loss": 1.0, "concepts/kl/night": 3.0}, {"step": 20, "loss": 0.5}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for run in ("first", "resumed"):
        with SummaryWriter(tmp_path / "run" / "logs" / run) as log:
            log.add_scalar("loss", 1.0 if run == "first" else 0.5, 20)
            if run == "first":
                log.add_scalar("loss", 1.0, 10)
                log.add_scalar("concepts/kl/night", 3.0, 10)
    for path in ("log.csv", "log.jsonl", "run"):
        assert plot.read_training_log(tmp_path / path) == expected


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no log in"):
        plot.read_training_log(tmp_path)
    with pytest.raises(FileNotFoundError, match="runn"):
        plot.read_training_log(tmp_path / "runn")
    (tmp_path / "log.txt").touch()
    with pytest.raises(ValueError, match="is no log"):
        plot.read_training_log(tmp_path / "log.txt")
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is damaged"):
        plot.read_training_log(tmp_path / "log.csv")


def test_noise_is_a_density_for_each_context_over_the_prior(tmp_path):
    noise = {"obs": RNG.normal(size=(200, 2, 3)), "night": np.full((10, 2, 3), 7.0)}
    figure = plot.exogenous_noise(noise, ["night", "hidden_0"], dimension=1)
    axes = figure.axes[1]
    obs, night = (patch.get_data() for patch in axes.patches)
    heights, _ = np.histogram(noise["obs"][:, 1, 1], obs.edges, density=True)
    np.testing.assert_allclose(obs.values, heights)
    assert night.values.argmax() == len(night.values) - 1  # what lies outside is in the last bin
    assert axes.get_title() == "hidden_0"
    drawn(figure, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(10, 2, 3\); give \(B, 1, d_z\)"):
        plot.exogenous_noise({"night": noise["night"]}, ["night"])


@pytest.mark.parametrize("library", ["matplotlib", "networkx"])
def test_a_missing_library_is_one_error_that_names_the_extra(library, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"needs {library}; run `pip install 'diffusers-ctx\[eval\]'`"):
        plot.causal_graph(np.eye(2), ["a", "b"])


def test_plain_pictures_do_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.draw_grid([PICTURES], ["obs"]).size == (6 * 8, 8 + 14)
