"""The benchmark's metrics, on samplers whose metrics are known, and its tables."""

import json
from pathlib import Path

import measure
import numpy as np
import pytest
import torch
from footnotes import expected_steps, footnotes, unlearned_singles
from measure import FLOOR_SEEDS, REAL_B_SEED, REAL_SEED, attribute_drift, may_move, measure_combination, measure_graph
from scipy.stats import wasserstein_distance
from tables import render_tables, summarize_method

from diffusers_ctx import ContextModule
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import read_attributes, sliced_wasserstein_distance


N = 60


@pytest.fixture(autouse=True)
def few_floors(monkeypatch):
    """Two real samples instead of eight; no other test finds them in the cache."""
    monkeypatch.setattr(measure, "FLOOR_SEEDS", FLOOR_SEEDS[:2])
    measure.real_floor.cache_clear()
    yield
    measure.real_floor.cache_clear()


def test_an_intervention_moves_its_concept_and_what_descends_from_it():
    assert may_move(["size"], dependent=False) == {"size"}
    assert may_move(["quad4"], dependent=True) == {"quad4", *quad.descendants("quad4")} > {"quad4", "quad3"}
    assert may_move([], dependent=True) == set()


def test_drift_is_the_mean_distance_of_the_attributes_that_must_not_move():
    rng = np.random.default_rng(0)
    reference, values = rng.random((50, 8)), rng.random((40, 8))
    kept = [name for name in quad.FACTORS if name not in ("orientation", "quad1")]
    columns = [quad.FACTORS.index(name) for name in kept]
    expected = np.mean([wasserstein_distance(values[:, i], reference[:, i]) for i in columns])
    assert attribute_drift(values, reference, {"quad1"}) == pytest.approx(expected)
    assert attribute_drift(values, values) == 0
    values[:, quad.FACTORS.index("size")] = np.nan  # as far as can be
    rest = [i for i in columns if quad.FACTORS[i] != "size"]
    expected = (sum(wasserstein_distance(values[:, i], reference[:, i]) for i in rest) + 1) / len(columns)
    assert attribute_drift(values, reference, {"quad1"}) == pytest.approx(expected)
    assert attribute_drift(values, reference, quad.FACTORS) is None


def test_a_floor_is_the_root_mean_square_of_several_real_samples():
    real = quad.generate(("quad1",), N, REAL_SEED).images
    distances = [
        sliced_wasserstein_distance(quad.generate(("quad1",), N, seed).images, real) for seed in FLOOR_SEEDS[:2]
    ]
    assert measure.real_floor(("quad1",), N, True) == pytest.approx(np.sqrt(np.mean(np.square(distances))))


def sample_from(*interventions: str):
    """A sampler that ignores what it is asked for."""
    return lambda captions, asked, seed: quad.generate(interventions, len(captions), seed=7).images


def test_samples_of_the_distribution_measure_as_real_images_and_those_of_another_do_not():
    right = measure_combination(sample_from("quad4"), ("quad4",), N, dependent=True)
    wrong = measure_combination(sample_from(), ("quad4",), N, dependent=True)
    assert right["debiased"] < 0.08 < 0.2 < wrong["debiased"]
    assert right["kid"] < 0.3 < wrong["kid"]
    assert right["conformity"] > 0.9 > 0.8 > wrong["conformity"]
    assert right["drift"] < 2 * right["drift_real"]
    real, again = (
        read_attributes(quad.generate(("quad4",), N, seed).images).values for seed in (REAL_SEED, REAL_B_SEED)
    )
    still = [name for name in ("color", "size", "shape") if name not in may_move(("quad4",), True)]
    assert set(right["diversity_of"]) == set(still) and list(right["conformity_of"]) == ["quad4"]
    assert right["conformity_of"]["quad4"] == right["conformity"]
    assert right["drift_real"] == pytest.approx(attribute_drift(again, real, may_move(("quad4",), True)))
    values = read_attributes(quad.generate(("quad4",), N, seed=7).images).values
    for name, ratio in right["diversity_of"].items():
        column = quad.FACTORS.index(name)
        expected = np.nanstd(values[:, column], ddof=1) / np.nanstd(real[:, column], ddof=1)
        assert ratio == pytest.approx(expected)


def test_a_graph_is_that_of_the_blocks_from_cause_to_effect():
    module = ContextModule(concepts=list(quad.CONCEPTS), token_dim=8, num_hidden_factors=2, noise_dim=1, concept_dim=1)
    with torch.no_grad():
        module.causal.blocks.zero_()
        for cause, effect in quad.EDGES:
            if {cause, effect} <= set(quad.CONCEPTS):
                module.causal.blocks[quad.CONCEPTS.index(effect), quad.CONCEPTS.index(cause)] = 0.7
    found = measure_graph(module)
    assert found["auroc"] == 1 and found["shd"] == 0
    with torch.no_grad():
        module.causal.blocks[:6, :6] = module.causal.blocks[:6, :6].transpose(0, 1).clone()
    found = measure_graph(module)
    assert found["auroc"] < 0.5 and found["shd"] > 0


def test_a_table_has_means_over_combinations_of_as_many_interventions(tmp_path):
    def metrics(debiased: float, conformity: float | None = None) -> dict:
        share = {} if conformity is None else {"conformity": conformity, "conformity_real": 0.8}
        measured = {"swd": debiased + 1, "floor": 0.5, "drift": 0.3, "drift_real": 0.1, "diversity": 0.9}
        return {"debiased": debiased, **measured, **share}

    contexts = {
        "obs": metrics(0.1),
        "quad1": metrics(0.2, 0.7),
        "size": metrics(0.4, 0.7),
        "quad1+size": metrics(0.5, 0.4),
        "quad1+quad2": metrics(0.7, 0.6),
        "quad1+size+quad2": metrics(0.9, 0.1),
    }
    options = {"independent": False, "seed": 0, "images_per_context": 20, "train_steps": 10, "concept_steps": 10}
    options |= {"baseline_steps": 15, "num_inference_steps": 2}
    row = {"method": "ours", "options": options, "seconds": 120, "contexts": contexts}
    assert summarize_method(row) is None  # not yet finished
    moved = np.ones((6, 8)).tolist()
    row |= {"interference": {"matrix": moved, "true_matrix": moved}, "graph": {"auroc": 1.0}}
    summary = summarize_method(row)
    expected = {"obs": 0.1, "singles": 0.3, "pairs": 0.6, "triples": 0.9, "pairs, raw": 1.6, "floor": 0.5}
    expected |= {"conformity of pairs": 0.5 / 0.8, "drift": 3.0, "diversity": 0.9, "edges": 1.0, "minutes": 2.0}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    folder = tmp_path / "dependent-seed0"
    folder.mkdir()
    (folder / "ours.json").write_text(json.dumps(row | {"unet_steps": 10}))
    matrix = np.ones((6, 8))
    matrix[quad.CONCEPTS.index("size"), quad.FACTORS.index("size")] = 0.49
    other = {"method": "prompt-lora", "unet_steps": 10}
    other |= {"interference": {"matrix": matrix.tolist(), "true_matrix": moved}}
    (folder / "prompt-lora.json").write_text(json.dumps(row | other))
    (folder / "unfinished.json").write_text(json.dumps({"method": "unfinished", "contexts": {}}))
    table = render_tables(tmp_path)
    assert table.startswith("### dependent-seed0\n")
    assert "| ours | 0.100 | 0.300 | 0.600 | 0.900 |" in table and "unfinished" not in table
    assert "| prompt-lora [1] [2] | 0.100 | 0.300 | 0.600 | 0.900 |" in table
    assert "[1] Not learned" in table and "change: size." in table
    assert "[2] Trained for 10 UNet steps; the code takes 15 now." in table


RESULTS = Path(measure.__file__).parent / "results" / "quad"


def published(name: str) -> dict:
    return json.loads((RESULTS / "dependent-seed0-images4000-steps1000" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("name", "unlearned"),
    [
        ("prompt-lora", ["quad2", "size", "orientation"]),
        ("composable-diffusion", ["quad2", "size", "orientation"]),
        ("concept-sliders", ["quad2", "size", "orientation"]),
        ("ours", ["orientation"]),
        ("lora-per-context", ["orientation"]),
        ("labels-only", ["orientation"]),
        ("autoencoder", []),
    ],
)
def test_a_single_intervention_that_hardly_moves_its_own_attribute_was_not_learned(name, unlearned):
    assert unlearned_singles(published(name)["interference"]) == unlearned


def test_the_table_says_which_method_had_fewer_steps_than_the_code_takes_now():
    notes = footnotes(published("oracle"))
    assert "Trained for 1,000 UNet steps; the code takes 1,500 now." in notes


def logged_steps(file: Path) -> int:
    """Optimizer steps of a log, those of several LoRAs together."""
    last: dict[str, int] = {}
    for line in file.read_text().splitlines()[1:]:
        metric, step, _ = line.split(",")
        if metric == "loss" or metric.startswith("loss/"):
            last[metric] = max(last.get(metric, 0), int(step))
    return sum(last.values())


def test_logged_trainings_have_the_steps_that_the_code_takes_now():
    checked = 0
    for log in RESULTS.glob("*/*.csv"):
        expected = expected_steps(json.loads(log.with_suffix(".json").read_text()))
        if expected is not None:  # time ends the training of the light VAE
            assert logged_steps(log) == expected, log
            checked += 1
    assert checked >= 20
