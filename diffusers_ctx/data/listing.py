"""Names in messages."""

from __future__ import annotations


_NAMED = 20


def listed(names: list[str]) -> str:
    """Some names for a message, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
