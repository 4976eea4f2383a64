"""The script that holds an adapter's nodes against the true factors, run as a user does."""

import json
from pathlib import Path

import pytest

from diffusers_ctx import embedded_adapter
from diffusers_ctx.data import quad


def test_it_measures_what_nodes_hold(run_program, tmp_path):
    script, output = Path(__file__).parents[2] / "benchmarks" / "concepts_quad.py", tmp_path / "concepts.json"
    printed = run_program(script, embedded_adapter("quad"), "--n", 200, "--output", output)
    found = json.loads(output.read_text())
    published = json.loads((script.parent / "results" / "quad-context-concepts.json").read_text())
    correlations = found["correlations"]
    assert list(correlations) == list(quad.CONCEPTS)
    for name, expected in published["correlations"].items():
        # of 2,000 images; a correlation of 200 is off by some 0.035 for orientation, and by less for the others
        assert correlations[name] == pytest.approx(expected, abs=0.1 if name == "orientation" else 0.02), name
    assert f"quad4            {correlations['quad4']:.2f}" in printed
    for group in ("values, of factors", "noise, of the factors' noise"):
        assert found[group].keys() == published[group].keys()
        assert found[group]["MCC"] == pytest.approx(published[group]["MCC"], abs=0.05)
        assert all(0 <= metric <= 1 for metric in found[group].values())
