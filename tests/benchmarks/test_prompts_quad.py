"""The script that holds samples against their prompts, run as a user does, and what it counts."""

import json
from pathlib import Path

import numpy as np
from measure import shape_met

from diffusers_ctx import embedded_adapter


def test_shapes_that_are_the_captions_are_counted():
    captions = ["a picture of a circle", "a picture of a square", "a picture of an ellipse", "a picture of a triangle"]
    values = np.zeros((3, 8))
    values[:, 6] = [0, 1 / 3, 2 / 3]
    values[:, 5] = 1
    assert shape_met(values, captions) == 2 / 3


def test_it_measures_shares_with_matching_noise_and_without(run_program, tmp_path):
    script, output = Path(__file__).parents[2] / "benchmarks" / "prompts_quad.py", tmp_path / "prompts.json"
    options = ["--n", 60, "--combinations", "quad4", "--output", output]
    printed = run_program(script, embedded_adapter("quad"), *options)
    metrics = json.loads(output.read_text())["quad4"]
    plain, matching = (metrics[noise]["shape_met"] for noise in ("any", "matching"))
    assert metrics["any"]["shape_met_real"] > 0.9
    assert plain + 0.15 < matching <= 1
    assert f"quad4, matching noise: shape_met {matching:.4f}" in printed
