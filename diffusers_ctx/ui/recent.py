"""A short memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar


T = TypeVar("T")


class Recent(Generic[T]):
    """Remembers the values that were asked for last. It is for one thread at a time.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: dict[Hashable, T] = {}  # the oldest first

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key; made if it is not remembered."""
        if key in self._values:
            value = self._values.pop(key)
        else:
            while len(self._values) >= self._size:  # before another is made, which may need their memory
                del self._values[next(iter(self._values))]
            value = make()
        self._values[key] = value
        return value
