"""What a picture was made with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from ..version import __version__


METADATA_KEY = "diffusers_ctx"
"""Name of the text in a PNG that holds the settings, as JSON."""


@dataclass(frozen=True)
class Settings:
    """What is set on the page.

    Attributes:
        prompt: what the picture shows.
        interventions: strengths in (0, 1] by concept; none is the observational context.
        seed: of both noises.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; up to 1 there is none.
    """

    prompt: str
    interventions: dict[str, float]
    seed: int
    num_inference_steps: int
    guidance_scale: float

    def under(self, interventions: dict[str, float]) -> Settings:
        """The same settings under other interventions."""
        return replace(self, interventions=interventions)

    @property
    def sampling(self) -> dict[str, Any]:
        """How any picture is drawn, as arguments of a pipeline."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}

    @property
    def context(self) -> str:
        """The interventions in words, such as `do(night, snow=0.5)`; `observational` without any."""
        names = [name if strength == 1 else f"{name}={strength:g}" for name, strength in self.interventions.items()]
        return f"do({', '.join(names)})" if names else "observational"


def save_with_settings(image: Image, file: Path, settings: Settings, models: dict[str, str | None]) -> None:
    """Writes a PNG that says how it was made.

    Args:
        image: the picture.
        file: the PNG.
        settings: what the picture was made with.
        models: names of the adapter and the base model.
    """
    metadata = PngInfo()
    metadata.add_itxt(METADATA_KEY, json.dumps({"version": __version__, **models, **asdict(settings)}))
    image.save(file, pnginfo=metadata)
