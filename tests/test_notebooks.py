"""The Jupyter notebooks run from their first cell to their last, offline; with few images and steps, and nothing else
changed."""

import ast
import json
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from matplotlib.figure import Figure


FOLDER = Path(__file__).parents[1] / "docs" / "jupyter"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FEWER = {
    r"images_per_context = \d+": "images_per_context = 8",
    r"(concept_steps|train_steps|inference_steps) = \d+": r"\1 = 2",
    r'("(concept|train)_batch_size"): \d+': r"\1: 6",
    r"n=64": "n=4",
    r"range\([46]\)": "range(2)",
}
MOST_BYTES = 100_000  # without pictures in them


@pytest.fixture(autouse=True)
def accelerate_as_in_a_new_process(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def run_cell(code: str, namespace: dict) -> object:
    """What a cell shows: the value of its last line, if that is an expression."""
    *statements, last = ast.parse(code).body
    if not isinstance(last, ast.Expr):
        statements.append(last)
    exec(compile(ast.Module(statements, []), "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace) if isinstance(last, ast.Expr) else None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    namespace: dict = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            code = re.sub(r"^%.*\n", "", "".join(cell["source"]))  # a magic of Jupyter
            for pattern, replacement in FEWER.items():
                code = re.sub(pattern, replacement, code)
            shown.append(run_cell(code, namespace))
    figures = [value for value in shown if value is not None]
    assert len(figures) >= 5 and all(isinstance(figure, Figure) for figure in figures)
    for figure in figures:
        figure.savefig(tmp_path / "figure.png")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and notebook.stat().st_size < MOST_BYTES
    assert all(cell["outputs"] == [] for cell in content["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "".join(line.rstrip() for cell in cells for line in cell["source"])
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links and all((FOLDER / link).exists() for link in links)


def test_there_are_two():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["counterfactuals", "train_and_compose"]
