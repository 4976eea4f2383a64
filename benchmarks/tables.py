"""Tables of the benchmark's results, with footnotes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from footnotes import footnotes


def render_tables(results_dir: Path) -> str:
    """A table in Markdown for every comparison with results in the folder."""
    tables = []
    for folder in sorted(path for path in results_dir.iterdir() if path.is_dir()):
        results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        notes: list[str] = []
        lines = [
            f"### {folder.name}",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|---" + "|---:" * (len(_COLUMNS) - 1) + "|",
        ]
        complete = [(row, result) for result in results if (row := summarize_method(result)) is not None]
        for row, result in sorted(complete, key=lambda pair: pair[0]["pairs"]):
            own = footnotes(result)
            notes += [note for note in own if note not in notes]
            marks = "".join(f" [{notes.index(note) + 1}]" for note in own)
            cells = [row["method"] + marks, *(cell(row[name]) for name in _COLUMNS[1:])]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"[{number}] {note}  " for number, note in enumerate(notes, start=1))]
        tables.append("\n".join(lines).rstrip())
    return "\n\n".join(tables)


def summarize_method(results: dict[str, Any]) -> dict[str, Any] | None:
    """Means over single interventions, pairs and triples; `None` while a method is not completely measured."""
    if "interference" not in results:
        return None
    contexts = results["contexts"]
    singles, pairs = names_of(contexts, 1), names_of(contexts, 2)
    mean = partial(mean_over, contexts)
    return {
        "method": results["method"],
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
    "method",
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
    """Debiased distances: of the observational context, and means over single interventions, pairs and triples."""
    groups = ("obs", "singles", "pairs", "triples")
    return {group: mean_over(contexts, names_of(contexts, count), "debiased") for count, group in enumerate(groups)}


def names_of(contexts: dict[str, Any], count: int) -> list[str]:
    """Names of the combinations of this many interventions."""
    return [name for name in contexts if len([part for part in name.split("+") if part != "obs"]) == count]


def mean_over(contexts: dict[str, Any], names: list[str], key: str) -> float | None:
    """Mean of a metric over the combinations that have it; `None` if none has."""
    found = [contexts[name][key] for name in names if contexts[name].get(key) is not None]
    return float(np.mean(found)) if found else None


def cell(value: Any) -> str:
    """A cell of a table; empty where nothing was measured."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.3f}"
