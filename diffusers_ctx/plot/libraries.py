"""The libraries of figures and metrics, which are an extra."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def require(module: str) -> Any:
    """A module of a library that figures or metrics need.

    Raises:
        ImportError: if the library is not installed, with the extra that has it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This needs {module.partition('.')[0]}; run `pip install 'diffusers-ctx[eval]'`."
        ) from error


def new_figure(width: float, height: float, **paddings: float) -> Figure:
    """An empty figure, its size in inches. It belongs to no window, so that a server can draw it.

    `paddings` are those of matplotlib's `ConstrainedLayoutEngine`, where they are not to be its defaults.
    """
    layout = require("matplotlib.layout_engine").ConstrainedLayoutEngine(**paddings)
    return require("matplotlib.figure").Figure(figsize=(width, height), layout=layout)
