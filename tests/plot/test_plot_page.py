"""The example of docs/plot.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
from PIL import Image


PAGE = Path(__file__).parents[2] / "docs" / "plot.md"


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, str(PAGE), "exec"), {})
    for name in ("strip", "counterfactual", "graph"):
        assert np.asarray(Image.open(f"{name}.png")).std() > 10
