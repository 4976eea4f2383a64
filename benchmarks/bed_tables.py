"""Tables of the comparisons on a test bed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import cell, mean_over, names_of

from diffusers_ctx.evaluation.report import reaches_floor


_GROUPS = ("obs", "singles", "pairs", "triples")
_OF_COUNTERFACTUALS = {"error": "error", "right": "all_right", "subject": "subject"}
_METRICS = {"right": "all_right", "subject": "subject", "distance": "debiased", "KID": "kid"}


def render_tables(results_dir: Path) -> str:
    """A table in Markdown for every comparison with results in the folder, sorted by the share of pairs right."""
    tables = []
    for folder in sorted(path for path in results_dir.glob("*") if path.is_dir()):
        results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
        groups = [group for count, group in enumerate(_GROUPS) if any(names_of(r["contexts"], count) for r in results)]
        columns = [f"{metric}, {group}" for metric in _METRICS for group in groups]
        lines = [
            f"### {folder.name}",
            "",
            "| method | " + " | ".join(columns) + " | minutes |",
            "|---" + "|---:" * (len(columns) + 1) + "|",
        ]
        rows = [summarize(result) for result in results]
        for row in sorted(rows, key=lambda row: -(row["right, pairs"] or 0)):
            cells = [cell(row[name]) for name in (*columns, "minutes")]
            lines.append("| " + " | ".join([row["method"], *cells]) + " |")
        if results:
            real = summarize(results[0], "_real")
            lines.append("| *real images* | " + " | ".join(cell(real.get(name)) for name in columns) + " | |")
        tables.append("\n".join(lines))
        if edited := [result for result in results if "counterfactuals" in result]:
            tables.append(_counterfactuals(edited, [group for group in groups if group != "obs"]))
    return "\n\n".join(tables)


def _counterfactuals(results: list[dict[str, Any]], groups: list[str]) -> str:
    """A table of counterfactuals of observational images, sorted by their distance to the truth under pairs."""
    columns = [f"{metric}, {group}" for metric in _OF_COUNTERFACTUALS for group in groups]
    rows = [(result["method"], _summarize_counterfactuals(result)) for result in results]
    rows.sort(key=lambda row: row[1]["error, pairs"] or 0)
    rows.append(("*unchanged*", _summarize_counterfactuals(results[0], "_unchanged")))
    lines = [f"| counterfactuals | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(cell(row[key]) for key in columns)} |" for name, row in rows)]
    )


def _summarize_counterfactuals(results: dict[str, Any], suffix: str = "") -> dict[str, float | None]:
    """Means over combinations of as many interventions."""
    contexts = results["counterfactuals"]
    return {
        f"{metric}, {group}": mean_over(contexts, names_of(contexts, count), key + suffix)
        for metric, key in _OF_COUNTERFACTUALS.items()
        for count, group in enumerate(_GROUPS)
    }


def summarize(results: dict[str, Any], suffix: str = "") -> dict[str, Any]:
    """Means of a method's metrics over combinations of as many interventions, and the minutes that it learned.

    A mean distance is inconclusive if all of its distances are; a method without steps of its own has no minutes.
    """
    contexts = results["contexts"]
    minutes = results["seconds"] / 60 if results.get("unet_steps") else None
    row: dict[str, Any] = {"method": results["method"], "minutes": minutes}
    for metric, key in _METRICS.items():
        for count, group in enumerate(_GROUPS):
            names = names_of(contexts, count)
            row[f"{metric}, {group}"] = mean_over(contexts, names, key + suffix)
            if metric == "distance" and names and all(reaches_floor(contexts[name]) for name in names):
                row[f"{metric}, {group}"] = "inconclusive"
    return row
