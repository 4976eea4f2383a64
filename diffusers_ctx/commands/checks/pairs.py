"""Files of one name in two contexts, which may show one scene without and with the intervention."""

from __future__ import annotations

import numpy as np

from ...data.contexts import listed
from .findings import Finding, Remark, counted
from .images import ImageTable


_SHUFFLES = 999
_FEWEST = 4  # pairs: 3 can be shuffled in 6 ways alone
_LEVEL = 0.01


def names_in_common(table: ImageTable, context: str, other: str) -> list[tuple[int, int]]:
    """Rows of the images of two contexts whose files have one name, whatever their extensions."""
    rows: dict[str, int] = {}
    for row in table.rows(context):
        if (path := table.paths[row]) is not None:
            rows[path.with_suffix("").as_posix()] = int(row)
    found = []
    for row in table.rows(other):
        path = table.paths[row]
        if path is not None and (twin := rows.get(path.with_suffix("").as_posix())) is not None:
            found.append((twin, int(row)))
    return found


def find_pairs(table: ImageTable, obs_context: str, seed: int = 0) -> list[Finding]:
    """Says for each context how many of its files have the name of one in the observational context, and whether
    those images are more alike than others are, by a permutation test on small copies."""
    findings: list[Finding] = []
    unlike: list[str] = []
    for context in table.names:
        if context == obs_context or not (pairs := names_in_common(table, obs_context, context)):
            continue
        p_value = _p_value(table, pairs, seed)
        if p_value is not None and p_value > _LEVEL:
            unlike.append(context)
            continue
        verdict = (
            "too few to tell whether they show the same scenes"
            if p_value is None
            else "and are more alike than others: they seem to show the same scenes"
        )
        message = (
            f"{counted(len(pairs), 'image')} in {context!r} and {obs_context!r} have the same file name, {verdict}."
        )
        details = {"context": context, "names": len(pairs), "p_value": p_value}
        findings.append(Remark("pairs by file name", message, details))
    if unlike:
        message = (
            f"Images of {listed(unlike)} have file names of {obs_context!r}, but are no more alike than others: these"
            " are no pairs of one scene."
        )
        findings.append(Remark("pairs by file name", message, {"contexts": unlike}))
    return findings


def _p_value(table: ImageTable, pairs: list[tuple[int, int]], seed: int) -> float | None:
    """How often pairs of other images would be so much alike; `None` if there are too few to say.

    The mean distance of the pairs is compared with that after shuffling who goes with whom.
    """
    if len(pairs) < _FEWEST:
        return None
    first, second = (table.thumbnails[list(rows)].reshape(len(pairs), -1).astype(np.float32) for rows in zip(*pairs))
    # shuffling changes the sum of the products alone
    products = (first - first.mean(axis=0)) @ (second - second.mean(axis=0)).T
    rng = np.random.default_rng(seed)
    order = np.arange(len(pairs))
    shuffled = [products[order, rng.permutation(order)].sum() for _ in range(_SHUFFLES)]
    return float((1 + np.sum(np.array(shuffled) >= np.trace(products))) / (1 + _SHUFFLES))
