"""The models that come with the library."""

from __future__ import annotations

from pathlib import Path


_FOLDER = Path(__file__).parent / "assets"
_ADAPTERS = {"quad": "quad-context"}
EMBEDDED_BASE = "embedded_base()"  # how adapters name it: its folder is elsewhere on every machine


def embedded_base() -> str:
    """Local folder of the shipped Stable Diffusion: 64x64 pixels, pretrained on quad images of all contexts pooled.

    Load it with `StableDiffusionPipeline.from_pretrained` or [`ComposablePipeline.from_pretrained`].
    """
    return str(_FOLDER / "quad-base")


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
