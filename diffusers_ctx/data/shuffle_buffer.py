"""A shuffle buffer whose place can be saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..keyed_random import keyed_seed


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class ResumableIterator(Protocol[T_co]):
    """An iterator whose place can be saved and restored."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __next__(self) -> T_co: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ShuffleBuffer(Generic[T]):
    """Iterates over a source, each run of `size` items in a random order.

    The next run is read while one is handed out, an item at a time, so that no step has to wait for a whole run.

    `state_dict` is the place in the source where the run began, and how many of its items were handed out: the items
    are not saved but read again.

    Args:
        source: the items.
        size: the length of a run; at most this many items are in memory.
        seed: with the number of the run, the seed of its order.
    """

    def __init__(self, source: ResumableIterator[T], size: int, seed: tuple[int, ...]):
        self.source = source
        self.size = size
        self.seed = seed
        self._number = 0  # runs begun
        self._run: list[T | None] = []
        self._order = np.empty(0, dtype=int)
        self._taken = 0
        self._next_run: list[T | None] = []
        self._start = self._next_start = source.state_dict()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self.fill():
            raise StopIteration
        place = self._order[self._taken]
        item, self._run[place] = self._run[place], None  # the item read next takes its room in memory
        self._taken += 1
        self._next_run += islice(self.source, 1)
        return item  # type: ignore[return-value]

    def fill(self) -> bool:
        """Reads a run if none is left; whether there is another item."""
        if self._taken == len(self._run):
            self._next_run += islice(self.source, self.size - len(self._next_run))
            if not self._next_run:
                return False
            self._begin_run()
        return True

    def state_dict(self) -> dict[str, Any]:
        """The place in the source."""
        return {"buffer": self._number, "start": self._start, "taken": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a place in the same source.

        Raises:
            ValueError: if the source has fewer items than it had.
        """
        self.source.load_state_dict(state_dict["start"])
        self._start = self._next_start = state_dict["start"]
        self._number, self._taken = state_dict["buffer"], state_dict["taken"]
        self._run, self._next_run = [], []
        if not self._number:
            return
        self._number -= 1
        self._next_run += islice(self.source, self.size)
        self._begin_run()
        self._taken = state_dict["taken"]
        if self._taken > len(self._run):
            raise ValueError("The source has fewer items than when its place was saved.")
        self._next_run += islice(self.source, self._taken)

    def _begin_run(self) -> None:
        self._number += 1
        self._run, self._next_run, self._taken = self._next_run, [], 0
        self._order = np.random.default_rng(keyed_seed(*self.seed, "run", self._number)).permutation(len(self._run))
        self._start, self._next_start = self._next_start, self.source.state_dict()
