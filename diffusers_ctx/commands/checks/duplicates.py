"""The same image twice: pixel for pixel, or saved again in another size or quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from .findings import Finding, Problem, Remark, counted
from .images import ImageTable


_SIDE = 16  # pixels of the perceptual hash
# levels of 255, root mean square: scaling and JPEG of quality 70 changed soft, noisy pictures by 2.6 at most, and the
# nearest two of 840 images of quad are 13 apart
_NEAR = 4.0
_CHUNK = 512  # rows compared at once


def find_duplicates(table: ImageTable) -> list[Finding]:
    """Images that are in two contexts, and images that are in one context twice.

    A copy in two contexts says that the intervention changes nothing. What an intervention changes a little, in a
    file of the same name, is a pair and no copy; see [`find_pairs`].
    """
    return [*_exact_copies(table), *_near_copies(table)]


def _exact_copies(table: ImageTable) -> Iterator[Finding]:
    groups = _groups_of_copies(table)
    if across := [rows for rows in groups if len(set(table.contexts[rows])) > 1]:
        message = f"{counted(len(across), 'image')} in two contexts or more, pixel for pixel: {_shown(table, across)}."
        yield Problem("duplicates", f"{message} Keep each in one.", _details(table, across))
    if within := [rows for rows in groups if len(set(table.contexts[rows])) < len(rows)]:
        message = f"{counted(len(within), 'image')} more than once in one context: {_shown(table, within)}."
        yield Remark("duplicates", message, _details(table, within))


def _near_copies(table: ImageTable) -> Iterator[Finding]:
    near = [list(pair) for pair in _near_pairs(table) if table.digests[pair[0]] != table.digests[pair[1]]]
    if unlike := [pair for pair in near if not _is_pair_by_name(table, *pair)]:
        message = f"{counted(len(unlike), 'pair')} of images in two contexts look the same: {_shown(table, unlike)}."
        message += " If they are copies, keep each in one."
        yield Problem("near duplicates", message, _details(table, unlike))
    if alike := [pair for pair in near if _is_pair_by_name(table, *pair)]:
        message = f"{counted(len(alike), 'pair')} of one file name hardly differ: {_shown(table, alike)}."
        message += " Is the intervention to be seen in them?"
        yield Remark("near duplicates", message, _details(table, alike))


def _groups_of_copies(table: ImageTable) -> list[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(table.digests):
        groups[digest].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _near_pairs(table: ImageTable) -> Iterator[tuple[int, int]]:
    """Pairs of images in different contexts whose small copies hardly differ."""
    factor = table.thumbnails.shape[1] // _SIDE
    small = table.thumbnails.reshape(len(table.thumbnails), _SIDE, factor, _SIDE, factor, 3).mean(axis=(2, 4))
    vectors = small.reshape(len(small), -1).astype(np.float32)
    vectors -= vectors.mean(axis=0)  # small numbers keep their digits in the products below
    squares = (vectors**2).sum(axis=1)
    codes = np.unique(table.contexts, return_inverse=True)[1]
    limit = _NEAR**2 * vectors.shape[1]
    for start in range(0, len(vectors), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distances = squares[rows, None] + squares[None, start:] - 2 * vectors[rows] @ vectors[start:].T
        near = np.argwhere((distances < limit) & (codes[rows, None] != codes[None, start:])) + start
        yield from ((int(a), int(b)) for a, b in near if a < b)


def _is_pair_by_name(table: ImageTable, a: int, b: int) -> bool:
    first, second = table.paths[a], table.paths[b]
    return first is not None and second is not None and first.with_suffix("") == second.with_suffix("")


def _shown(table: ImageTable, groups: list[list[int]]) -> str:
    more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
    return "; ".join(table.shown(rows) for rows in groups[:3]) + more


def _details(table: ImageTable, groups: list[list[int]]) -> dict[str, list[list[str]]]:
    return {"images": [[f"{table.contexts[row]}/{table.paths[row] or row}" for row in rows] for rows in groups]}
