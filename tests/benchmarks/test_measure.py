"""What the benchmark measures, on samplers whose figures are known, and its tables."""

import json

import measure
import numpy as np
import pytest
import torch
from measure import AGAIN_SEED, FLOOR_SEEDS, REAL_SEED, attribute_drift, may_move, measure_combination, measure_graph
from scipy.stats import wasserstein_distance
from tables import render_tables, summarize_row

from diffusers_ctx import ContextModule
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import read_attributes, sliced_wasserstein_distance


N = 60


@pytest.fixture(autouse=True)
def few_floors(monkeypatch):
    """Two real samples in the place of eight, which nobody else is to find in the cache."""
    monkeypatch.setattr(measure, "FLOOR_SEEDS", FLOOR_SEEDS[:2])
    measure.real_floor.cache_clear()
    yield
    measure.real_floor.cache_clear()


def test_an_intervention_moves_its_concept_and_what_descends_from_it():
    assert may_move(["size"], dependent=False) == {"size"}
    assert may_move(["quad4"], dependent=True) == {"quad4", *quad.descendants("quad4")} > {"quad4", "quad3"}
    assert may_move([], dependent=True) == set()


def test_drift_is_the_mean_distance_of_the_laws_of_what_must_not_move():
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


def draw_law_of(*interventions: str):
    """A sampler that ignores what it is asked for."""
    return lambda captions, asked, seed: quad.generate(interventions, len(captions), seed=7).images


def test_figures_of_the_law_are_those_of_real_images_and_of_another_law_they_are_not():
    right = measure_combination(draw_law_of("quad4"), ("quad4",), N, dependent=True)
    wrong = measure_combination(draw_law_of(), ("quad4",), N, dependent=True)
    assert right["debiased"] < 0.08 < 0.2 < wrong["debiased"]
    assert right["kid"] < 0.3 < wrong["kid"]
    assert right["conformity"] > 0.9 > 0.8 > wrong["conformity"]
    assert right["drift"] < 2 * right["drift_real"]
    real, again = (
        read_attributes(quad.generate(("quad4",), N, seed).images).values for seed in (REAL_SEED, AGAIN_SEED)
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
    def figures(debiased: float, conformity: float | None = None) -> dict:
        laws = {} if conformity is None else {"conformity": conformity, "conformity_real": 0.8}
        measured = {"swd": debiased + 1, "floor": 0.5, "drift": 0.3, "drift_real": 0.1, "diversity": 0.9}
        return {"debiased": debiased, **measured, **laws}

    contexts = {
        "obs": figures(0.1),
        "quad1": figures(0.2, 0.7),
        "size": figures(0.4, 0.7),
        "quad1+size": figures(0.5, 0.4),
        "quad1+quad2": figures(0.7, 0.6),
        "quad1+size+quad2": figures(0.9, 0.1),
    }
    row = {"row": "ours", "seconds": 120, "contexts": contexts}
    assert summarize_row(row) is None  # not yet finished
    row |= {"interference": {}, "graph": {"auroc": 1.0}}
    summary = summarize_row(row)
    expected = {"obs": 0.1, "singles": 0.3, "pairs": 0.6, "triples": 0.9, "pairs, raw": 1.6, "floor": 0.5}
    expected |= {"conformity of pairs": 0.5 / 0.8, "drift": 3.0, "diversity": 0.9, "edges": 1.0, "minutes": 2.0}
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    folder = tmp_path / "dependent-seed0"
    folder.mkdir()
    (folder / "ours.json").write_text(json.dumps(row))
    (folder / "prompt-lora.json").write_text(json.dumps(row | {"row": "prompt-lora", "interference": {}}))
    (folder / "unfinished.json").write_text(json.dumps({"row": "unfinished", "contexts": {}}))
    table = render_tables(tmp_path)
    assert table.startswith("### dependent-seed0\n")
    assert table.count("| 0.100 | 0.300 | 0.600 | 0.900 |") == 2 and "unfinished" not in table
