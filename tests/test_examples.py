"""Examples run, and what they show is true."""

import runpy
from pathlib import Path


def test_the_minimal_example_composes():
    """Both interventions are near their true distribution, and far nearer than what ignores one, or adds shifts."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "minimal.py"))
    found = example["main"](seed=0)
    baselines = ("shifts of the single interventions, added", "do(night) alone", "do(snow) alone")
    assert found["composed"] < 0.02
    assert all(found["composed"] < found[name] / 2 for name in baselines)
    assert found["edge night -> snow"] > 10 * found["edge snow -> night"]
