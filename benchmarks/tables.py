"""Tables of the benchmark's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def render_tables(results_dir: Path) -> str:
    """A table in Markdown for every comparison with results in the folder."""
    tables = []
    for folder in sorted(path for path in results_dir.iterdir() if path.is_dir()):
        results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        lines = [
            f"### {folder.name}",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|---" + "|---:" * (len(_COLUMNS) - 1) + "|",
        ]
        complete = [row for row in map(summarize_row, results) if row is not None]
        for row in sorted(complete, key=lambda row: row["pairs"]):
            lines.append("| " + " | ".join(_cell(row[name]) for name in _COLUMNS) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def summarize_row(results: dict[str, Any]) -> dict[str, Any] | None:
    """Means over single interventions, pairs and triples; `None` while a row is unfinished."""
    if "interference" not in results:
        return None
    contexts = results["contexts"]
    singles, pairs, triples = ([name for name in contexts if name.count("+") == joined] for joined in range(3))
    singles = [name for name in singles if name != "obs"]

    def mean(key: str, names: list[str]) -> float:
        values = [contexts[name][key] for name in names if contexts[name].get(key) is not None]
        return float(np.mean(values))

    return {
        "row": results["row"],
        "obs": contexts["obs"]["debiased"],
        "singles": mean("debiased", singles),
        "pairs": mean("debiased", pairs),
        "triples": mean("debiased", triples),
        "pairs, raw": mean("swd", pairs),
        "floor": mean("floor", pairs),
        "conformity of pairs": mean("conformity", pairs) / mean("conformity_real", pairs),
        "drift": mean("drift", [*singles, *pairs]) / mean("drift_real", [*singles, *pairs]),
        "diversity": mean("diversity", pairs),
        "edges": results.get("graph", {}).get("auroc"),
        "minutes": results["seconds"] / 60,
    }


_COLUMNS = (
    "row",
    "obs",
    "singles",
    "pairs",
    "triples",
    "pairs, raw",
    "floor",
    "conformity of pairs",
    "drift",
    "diversity",
    "edges",
    "minutes",
)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3f}"
