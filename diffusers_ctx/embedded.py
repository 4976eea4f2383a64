"""The models that come with the library."""

from __future__ import annotations

from pathlib import Path

from .paths import local_path


_FOLDER = Path(__file__).parent / "assets"
_BASES = {"quad": "quad-base", "pictures": "pictures-base"}
_ADAPTERS = {"quad": "quad-context"}


def embedded_base(name: str = "quad") -> str:
    """Local folder of a shipped Stable Diffusion of 64x64 pixels.

    Load it with `StableDiffusionPipeline.from_pretrained` or [`ComposablePipeline.from_pretrained`].

    Args:
        name: `"quad"`, pretrained on quad images of all contexts pooled, or `"pictures"`, on drawings, digits and
            photographs.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _BASES:
        raise ValueError(f"There is no embedded base '{name}'; there are {list(_BASES)}.")
    return str(_FOLDER / _BASES[name])


def embedded_call(folder: str | Path) -> str | None:
    """The call that gives an embedded base, as adapters name it: its folder is elsewhere on every machine.

    `None` for other folders.
    """
    names = {Path(embedded_base(name)).resolve(): name for name in _BASES}
    name = names.get(Path(folder).resolve())
    return None if name is None else _call(name)


def called_base(call: str | None) -> str | None:
    """The folder of the embedded base that an adapter names by a call; `None` for other names."""
    return next((embedded_base(name) for name in _BASES if _call(name) == call), None)


def _call(name: str) -> str:
    return "embedded_base()" if name == "quad" else f'embedded_base("{name}")'


def embedded_adapter(name: str) -> str:
    """Local folder of a shipped context adapter for the embedded base.

    Load it with [`~ComposablePipeline.load_context_adapter`].

    Args:
        name: `"quad"`, trained on the dependent variant's seven contexts.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _ADAPTERS:
        raise ValueError(f"There is no embedded adapter '{name}'; there are {list(_ADAPTERS)}.")
    return str(_FOLDER / _ADAPTERS[name])


def embedded_adapters() -> list[str]:
    """Names of the shipped adapters."""
    return list(_ADAPTERS)


def embedded_or_given(name: str) -> str:
    """The folder of the shipped adapter of that name, unless there is a path of that name here; else `name` itself.

    Raises:
        ValueError: if it names the home folder of an unknown user.
    """
    return embedded_adapter(name) if name in _ADAPTERS and not local_path(name).exists() else name
