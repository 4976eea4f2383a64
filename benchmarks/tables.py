"""Tables of the benchmark's results."""

from __future__ import annotations

import json
from functools import partial
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
    singles, pairs = names_of(contexts, 1), names_of(contexts, 2)
    mean = partial(mean_over, contexts)
    return {
        "row": results["row"],
        **distances(contexts),
        "pairs, raw": mean(pairs, "swd"),
        "floor": mean(pairs, "floor"),
        "conformity of pairs": mean(pairs, "conformity") / mean(pairs, "conformity_real"),
        "drift": mean(singles + pairs, "drift") / mean(singles + pairs, "drift_real"),
        "diversity": mean(pairs, "diversity"),
        "KID of pairs": mean(pairs, "kid"),
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
    "KID of pairs",
    "edges",
    "minutes",
)


def distances(contexts: dict[str, Any]) -> dict[str, float]:
    """Debiased, of the observational context, and means over single interventions, pairs and triples."""
    groups = ("obs", "singles", "pairs", "triples")
    return {group: mean_over(contexts, names_of(contexts, count), "debiased") for count, group in enumerate(groups)}


def names_of(contexts: dict[str, Any], count: int) -> list[str]:
    """Of the combinations of so many interventions."""
    return [name for name in contexts if len([part for part in name.split("+") if part != "obs"]) == count]


def mean_over(contexts: dict[str, Any], names: list[str], key: str) -> float | None:
    """Mean of a figure over those combinations that have it, `None` if none has."""
    found = [contexts[name][key] for name in names if contexts[name].get(key) is not None]
    return float(np.mean(found)) if found else None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3f}"
