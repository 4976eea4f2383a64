"""The script that holds an adapter's nodes against the true factors, run as a user does."""

import json
import subprocess
import sys
from pathlib import Path

from diffusers_ctx import embedded_adapter
from diffusers_ctx.data import quad


def test_it_measures_what_nodes_hold(tmp_path):
    script, output = Path(__file__).parents[2] / "benchmarks" / "concepts_quad.py", tmp_path / "concepts.json"
    command = [sys.executable, script, embedded_adapter("quad"), "--n", "60", "--output", output]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())
    correlations = figures["correlations"]
    assert list(correlations) == list(quad.CONCEPTS) and correlations["quad4"] > 0.8
    assert f"quad4            {correlations['quad4']:.2f}" in run.stdout
    codes, noise = figures["values, of factors"], figures["noise, of the factors' noise"]
    assert codes["MCC"] > 0.75 and noise["MCC"] > 0.6 and codes.keys() == noise.keys()
    assert all(0 <= figure <= 1 for group in (codes, noise) for figure in group.values())
