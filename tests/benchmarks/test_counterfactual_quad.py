"""The script that holds counterfactuals against the simulator's, run as a user does."""

import json
import subprocess
import sys
from pathlib import Path

from provenance import adapter_digest

from diffusers_ctx import embedded_adapter


def test_it_measures_axioms_and_the_distance_to_the_truth(tmp_path):
    script, output = Path(__file__).parents[2] / "benchmarks" / "counterfactual_quad.py", tmp_path / "found.json"
    command = [sys.executable, script, embedded_adapter("quad"), "--n", "4", "--num_inference_steps", "5"]
    run = subprocess.run([*command, "--output", output], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads(output.read_text())
    assert figures["adapter"] == adapter_digest(embedded_adapter("quad")) and figures["commit"]
    composition = figures["composition"]
    assert 0 < composition["once"] < 0.1 and composition["once"] < composition["10 rounds"] < 0.5
    quad4 = figures["interventions"]["quad4"]
    assert quad4["error"] < quad4["error_unchanged"] / 2
    assert quad4["effectiveness"] < 0.3 and quad4["minimality"] < 0.3 and quad4["reversibility"] < 0.2
