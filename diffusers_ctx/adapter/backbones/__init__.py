"""Families of backbones: a module for each, and what all of them say."""

from __future__ import annotations

from typing import Any

from .base import Backbone, ContextProjection, original_of
from .flux import FluxBackbone
from .noising import Noising, Step
from .sd3 import SD3Backbone
from .sdxl import XLBackbone
from .unet import UNetBackbone


__all__ = [
    "FAMILIES",
    "Backbone",
    "ContextProjection",
    "Noising",
    "Step",
    "UNetBackbone",
    "backbone_of",
    "backbone_of_pipeline",
    "native_resolution",
]

# the first that fits counts
FAMILIES: tuple[type[Backbone], ...] = (XLBackbone, UNetBackbone, SD3Backbone, FluxBackbone)


def backbone_of(model: Any) -> Backbone:
    """A model that denoises, seen as one of its family.

    Raises:
        ValueError: if it is of none.
    """
    original = original_of(model)
    for family in FAMILIES:
        if family.is_of(original):
            return family(model)
    raise ValueError(_unknown(type(original).__name__))


def backbone_of_pipeline(pipeline: Any) -> Backbone:
    """The backbone of a pipeline.

    Raises:
        ValueError: if its family is not known.
    """
    for family in FAMILIES:
        if (model := getattr(pipeline, family.component, None)) is not None:
            return backbone_of(model)
    raise ValueError(_unknown(type(pipeline).__name__))


def native_resolution(pipeline: Any) -> int:
    """Height and width of the images that a pipeline's backbone is made for, in pixels.

    Raises:
        ValueError: if its configuration does not say, or they are no squares.
    """
    backbone = backbone_of_pipeline(pipeline)
    size = backbone.sample_size
    sides = {size} if isinstance(size, int | None) else set(size)
    if len(sides) != 1 or None in sides:
        raise ValueError(
            f"The base model's {backbone.name} has the `sample_size` {size}, which does not say the side of a square;"
            " give `resolution`, in pixels."
        )
    return sides.pop() * pipeline.vae_scale_factor


def _unknown(name: str) -> str:
    known = " or ".join(dict.fromkeys(family.model_class.__name__ for family in FAMILIES))
    return f"Context adapters are not for {name}; they take a pipeline with a {known}."
