"""Rows of a streamed dataset: the order of an epoch, and a process's share of one context."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import IterableDataset

from ..keyed_random import keyed_seed


logger = logging.getLogger(__name__)

Row = dict[str, Any]

_WARN_AFTER = 10_000  # consecutive rows that are not wanted
_GIVE_UP_AFTER = 1_000_000


class ContextRows:
    """A process's share of a context's rows, in one epoch. `state_dict` is the place in them.

    Args:
        rows: the rows of all contexts.
        context: the context.
        context_of: tells the context of a row.
        share: (index, number): every `number`-th row of the context, from row `index`.
        seed: with the epoch, the seed of the order of files.
        epoch: the epoch.
    """

    def __init__(
        self,
        rows: IterableDataset,
        context: str,
        context_of: Callable[[Row], str],
        share: tuple[int, int],
        seed: int,
        epoch: int,
    ):
        self._rows = rows
        self._share = share
        self._seen = 0  # rows of the context
        ordered = in_epoch(rows, seed, epoch)
        self._own = self._in_share(matching(ordered, lambda row: context_of(row) == context, lambda: repr(context)))

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        return next(self._own)

    def state_dict(self) -> dict[str, Any]:
        # before the first row, the dataset has its place in the epoch before
        return {"rows": self._rows.state_dict() if self._seen else None, "seen": self._seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a place; nothing must have been read yet."""
        self._rows.load_state_dict(state_dict["rows"])
        self._seen = state_dict["seen"]

    def _in_share(self, rows: Iterable[Row]) -> Iterator[Row]:
        index, number = self._share
        for row in rows:
            self._seen += 1
            if (self._seen - 1) % number == index:
                yield row


def in_epoch(rows: IterableDataset, seed: int, epoch: int) -> Iterator[Row]:
    """The rows, with the files in the order of an epoch."""
    rows.set_epoch(keyed_seed(seed, "files", epoch) % 2**32)
    yield from rows


def matching(rows: Iterable[Row], is_wanted: Callable[[Row], bool], wanted: Callable[[], str]) -> Iterator[Row]:
    """The wanted rows; warns after many others in a row, and gives up after a million.

    Raises:
        ValueError: if it gives up; `wanted` describes in it what was looked for.
    """
    useless = 0
    for row in rows:
        if is_wanted(row):
            useless = 0
            yield row
            continue
        useless += 1
        if useless % _WARN_AFTER == 0:
            logger.warning(f"The last {useless} rows of the stream had no image of {wanted()}; reading on.")
        if useless >= _GIVE_UP_AFTER:
            raise ValueError(
                f"The last {useless} rows of the stream had no image of {wanted()}. Add images of it, or shuffle the"
                " dataset, so that those of all contexts lie beside one another."
            )
