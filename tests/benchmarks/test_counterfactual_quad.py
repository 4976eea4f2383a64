"""The script that holds counterfactuals against the simulator's, run as a user does."""

import json
from pathlib import Path

from provenance import adapter_digest

from diffusers_ctx import embedded_adapter


def test_it_measures_axioms_and_the_distance_to_the_truth(run_program, tmp_path):
    script, output = Path(__file__).parents[2] / "benchmarks" / "counterfactual_quad.py", tmp_path / "found.json"
    run_program(script, embedded_adapter("quad"), "--n", 12, "--num_inference_steps", 10, "--output", output)
    found = json.loads(output.read_text())
    assert found["adapter"] == adapter_digest(embedded_adapter("quad")) and found["commit"]
    published = json.loads((script.parent / "results" / "quad-context-counterfactuals.json").read_text())
    composition = found["composition"]
    assert 0 < composition["once"] < composition["10 rounds"]
    # fewer steps than published, and fewer images: within twice the published errors, and 0.01
    for name, expected in published["composition"].items():
        assert composition[name] < 2 * expected + 0.01, name
    for interventions, expected in published["interventions"].items():
        measured = found["interventions"][interventions]
        for name in ("error", "effectiveness", "minimality", "reversibility"):
            assert measured[name] < 2 * expected[name] + 0.01, (interventions, name)
        assert measured["error"] < measured["error_unchanged"]
