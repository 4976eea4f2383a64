"""Renders a toy under a colored spotlight before a colored background, with mitsuba's path tracer on the CPU."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


BODIES = ("box", "ball", "drum")
_SAMPLES = 16  # for each pixel
_BOUNCES = 4


@dataclass(frozen=True)
class View:
    """What is rendered; lengths are in units of which the toy is two high.

    Attributes:
        body: one of [`BODIES`].
        x: of the toy, to the right.
        depth: of the toy, away from the viewer.
        angle: that the toy is turned by, in degrees.
        light: direction that the spotlight shines from, in degrees.
        background: hue of floor and wall, in turns.
        toy: hue of the toy.
        spotlight: hue of the light.
        seed: of the renderer.
    """

    body: str
    x: float
    depth: float
    angle: float
    light: float
    background: float
    toy: float
    spotlight: float
    seed: int


def render(view: View, resolution: int) -> np.ndarray:
    """A picture (R, R, 3) uint8.

    Raises:
        ImportError: if mitsuba is not installed.
    """
    mi = _mitsuba()
    radiance = np.array(mi.render(mi.load_dict(_scene(mi, view, resolution)), seed=view.seed)).clip(0, 1)
    encoded = np.where(radiance <= 0.0031308, 12.92 * radiance, 1.055 * radiance ** (1 / 2.4) - 0.055)  # sRGB
    return np.rint(255 * encoded).astype(np.uint8)


def _mitsuba() -> ModuleType:
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError("Scenes are rendered with mitsuba; run `pip install 'diffusers-ctx[scenes]'`.") from error
    mitsuba.set_variant("scalar_rgb")
    return mitsuba


def _scene(mi: ModuleType, view: View, resolution: int) -> dict[str, Any]:
    transform = mi.ScalarTransform4f
    paint = _paint(view.background, 0.7)
    azimuth = np.radians(view.light)
    lamp = [view.x + 3 * np.cos(azimuth), view.depth + 3 * np.sin(azimuth), 6]
    return {
        "type": "scene",
        "integrator": {"type": "path", "max_depth": _BOUNCES},
        "sensor": {
            "type": "perspective",
            "fov": 30,
            "to_world": transform().look_at(origin=[0, -7, 3.4], target=[0, 0, 0.8], up=[0, 0, 1]),
            "film": {"type": "hdrfilm", "width": resolution, "height": resolution, "pixel_format": "rgb"},
            "sampler": {"type": "multijitter", "sample_count": _SAMPLES},
        },
        "floor": {"type": "rectangle", "to_world": transform().scale(20), "bsdf": paint},
        "wall": {
            "type": "rectangle",
            "to_world": transform().translate([0, 4, 0]).rotate([1, 0, 0], 90).scale(20),
            "bsdf": paint,
        },
        "sky": {"type": "constant", "radiance": {"type": "rgb", "value": 0.3}},
        "lamp": {
            "type": "spot",
            "to_world": transform().look_at(origin=lamp, target=[view.x, view.depth, 0.6], up=[0, 0, 1]),
            "intensity": _color(view.spotlight, 0.85, 70),
            "cutoff_angle": 18,
            "beam_width": 15,
        },
        **_toy(mi, view),
    }


def _toy(mi: ModuleType, view: View) -> dict[str, Any]:
    """A body with a head on it and an arm that shows how it is turned."""
    place = mi.ScalarTransform4f().translate([view.x, view.depth, 0]).rotate([0, 0, 1], view.angle)
    bodies = {
        "box": {"type": "cube", "to_world": place @ mi.ScalarTransform4f().translate([0, 0, 0.6]).scale(0.6)},
        "ball": {"type": "sphere", "to_world": place, "center": [0, 0, 0.7], "radius": 0.7},
        "drum": {"type": "cylinder", "to_world": place, "p0": [0, 0, 0], "p1": [0, 0, 1.2], "radius": 0.65},
    }
    lid = {"type": "disk", "to_world": place @ mi.ScalarTransform4f().translate([0, 0, 1.2]).scale(0.65)}
    shapes = {
        "body": bodies[view.body],
        "head": {"type": "sphere", "to_world": place, "center": [0, 0, 1.6], "radius": 0.42},
        "arm": {"type": "cylinder", "to_world": place, "p0": [0.5, 0, 0.6], "p1": [1.2, 0, 0.6], "radius": 0.2},
        "hand": {"type": "sphere", "to_world": place, "center": [1.25, 0, 0.6], "radius": 0.34},
        **({"lid": lid} if view.body == "drum" else {}),
    }
    paint = _paint(view.toy, 0.8)
    return {name: {**shape, "bsdf": paint} for name, shape in shapes.items()}


def _paint(hue: float, reflectance: float) -> dict[str, Any]:
    return {"type": "twosided", "bsdf": {"type": "diffuse", "reflectance": _color(hue, 0.75, reflectance)}}


def _color(hue: float, saturation: float, value: float) -> dict[str, Any]:
    return {"type": "rgb", "value": [value * part for part in colorsys.hsv_to_rgb(hue % 1, saturation, 1)]}
