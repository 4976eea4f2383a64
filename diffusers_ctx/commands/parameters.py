"""Kinds of arguments that several commands take."""

from __future__ import annotations

from typing import Any

import click

from ..embedded import embedded_or_given
from ..paths import local_path


class LocalPath(click.ParamType):
    """A path, also with `~`."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return local_path(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ExistingPath(LocalPath):
    """A path of a file or folder that is there."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if not path.exists():
            self.fail(f"there is no {value}.", param, ctx)
        return path


class Adapter(click.ParamType):
    """A folder or Hub id of an adapter, or the name of one that comes with the library."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return embedded_or_given(value)


class Context(click.ParamType):
    """A context, such as `obs`, `night`, `night+snow` or `night=0.5+snow`, as strengths by concept."""

    name = "context"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        strengths: dict[str, float] = {}
        for part in value.split("+"):
            concept, given, strength = part.partition("=")
            concept = concept.strip()
            try:
                strengths[concept] = float(strength) if given else 1.0
            except ValueError:
                self.fail(f"the strength of {concept!r} is {strength!r}; give a number in [0, 1].", param, ctx)
            if not concept:
                self.fail(f"{value!r} lacks a concept; write night, night+snow or night=0.5+snow.", param, ctx)
            if not 0 <= strengths[concept] <= 1:
                self.fail(
                    f"the strength of {concept!r} is {strength.strip()}; strengths are numbers in [0, 1].", param, ctx
                )
        return strengths


def named(interventions: dict[str, float]) -> str:
    """A context's name, the way `Context` reads it."""
    return "+".join(name if strength == 1 else f"{name}={strength:g}" for name, strength in interventions.items())
