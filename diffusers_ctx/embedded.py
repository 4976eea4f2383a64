"""The models that come with the library."""

from __future__ import annotations

from pathlib import Path


_FOLDER = Path(__file__).parent / "assets"


def embedded_base() -> str:
    """Local folder of the shipped Stable Diffusion: 64x64 pixels, pretrained on quad images of all contexts pooled.

    Load it with `StableDiffusionPipeline.from_pretrained` or [`ComposablePipeline.from_pretrained`].
    """
    return str(_FOLDER / "quad-base")
