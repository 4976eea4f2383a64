"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: the check's name.
        message: what it found, and what that means, in a sentence or two.
        details: the same for machines, as JSON takes it.
    """

    check: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


class Problem(Finding):
    """What is likely to spoil a training."""


class Remark(Finding):
    """What is worth to know, and may be as it should be."""


def counted(number: int, noun: str) -> str:
    """Such as `1 image` and `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
