"""Options of a program: fields of dataclasses that are flags too, with their help, choices and bounds."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from .paths import expand_home


@dataclass(frozen=True)
class Bounds:
    """The range of a number. It must be finite, too, unless it may be infinite."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    infinite: bool = False

    def broken_by(self, value: float) -> str | None:
        """What the value must be and is not; `None` if nothing is wrong. NaN is in no range."""
        inside = (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not inside:
            return str(self)
        return None if self.infinite or math.isfinite(value) else "finite"

    def __str__(self) -> str:
        if self.above is not None:
            return f"above {self.above}"
        if self.below is not None:
            return f"in [{self.at_least}, {self.below})"
        return f"{self.at_least} or more" if self.at_most is None else f"in [{self.at_least}, {self.at_most}]"


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field of an [`OptionGroup`]; `bounds` are those of [`Bounds`], for a number."""
    return field(default=default, metadata={"help": help, "bounds": Bounds(**bounds)})


def path_option(default: Any, help: str) -> Any:
    """A field that is or may be a path."""
    return field(default=default, metadata={"help": help, "is_path": True})


def kind_of(annotation: Any) -> Any:
    """The type of an option from its annotation, without the `None` of an option that may be left open."""
    arguments = get_args(annotation)
    return next(kind for kind in arguments if kind is not NoneType) if NoneType in arguments else annotation


class OptionGroup:
    """Options that are checked as soon as they are given, in Python as on the command line. `~` in paths is expanded.

    Raises:
        ValueError: if an option is none of its choices or outside of its bounds, or a path names an unknown home.
    """

    def __post_init__(self) -> None:
        annotations = get_type_hints(type(self))
        for given in fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, given.name), kind_of(annotations[given.name])
            if value is None:
                continue
            if given.metadata.get("is_path"):
                setattr(self, given.name, expand_home(os.fspath(value)))
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"`{given.name}` is {value!r}; choose one of {list(get_args(kind))}.")
            if kind in (int, float) and (wanted := given.metadata["bounds"].broken_by(value)):
                raise ValueError(f"`{given.name}` is {value}; it must be {wanted}.")


class OptionParser(HfArgumentParser):
    """Parses flags into groups of options; `--help` lists their choices."""

    def add_argument(self, *names: str, bounds: Any = None, is_path: bool = False, **options: Any) -> Any:
        """See `argparse`. The groups check bounds and expand paths themselves."""
        return super().add_argument(*names, **options)
