"""The script that holds an adapter's nodes against the true factors, run as a user does."""

import subprocess
import sys
from pathlib import Path

from diffusers_ctx import embedded_adapter
from diffusers_ctx.data import quad


def test_it_prints_a_correlation_for_each_concept():
    script = Path(__file__).parents[2] / "benchmarks" / "concepts_quad.py"
    command = [sys.executable, script, embedded_adapter("quad"), "--n", "20"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = dict(line.split() for line in run.stdout.splitlines())
    assert list(printed) == list(quad.CONCEPTS) and float(printed["quad4"]) > 0.8
