"""Night, snow and fog as operations on photographs taken by day.

They work on linear light, in the order in which light meets them: snow lies on what is there, night changes the light,
fog lies between it and the camera, flakes fall in front. So two of them together are more than one after the other:
fog at night is dark, and so are flakes. Depth and sky are estimated from one picture by rules of thumb.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


_LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
_MOONLIGHT = np.array([0.55, 0.75, 1.25], dtype=np.float32)
_LAMP = np.array([1.0, 0.75, 0.4], dtype=np.float32)
_SNOW = np.array([0.86, 0.89, 0.94], dtype=np.float32)
_FOG = np.array([0.66, 0.69, 0.72], dtype=np.float32)
_MARGIN = 8
_NEAREST, _FURTHEST = 0.15, 0.75  # of what is no sky; the sky is at 1
# of flakes, from far to near: number per picture, radius and length of the fall in pixels of 64, opacity
_LAYERS = ((110, 0.35, 0.0, 0.5), (45, 0.6, 0.5, 0.7), (14, 1.0, 1.2, 0.85))


@dataclass(frozen=True)
class Degrees:
    """How strong the operations are.

    Attributes:
        night: stops by which light is darker.
        snow: from 0, no cover, to 1, nearly all but walls and sky.
        fog: optical thickness up to the sky.
    """

    night: float
    snow: float
    fog: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Degrees:
        return cls(rng.uniform(1.3, 2.4), rng.uniform(0.4, 1.0), rng.uniform(0.7, 2.0))


def sky(photograph: np.ndarray) -> np.ndarray:
    """How much of each pixel (h, w) is sky, in [0, 1]: what is smooth, blue or bright, and reaches the upper edge.

    Args:
        photograph: (h, w, 3) in [0, 1], as stored, some 300 pixels wide.
    """
    brightness, blue = photograph.max(-1), photograph[..., 2] - photograph[..., 0]
    rough = ndimage.gaussian_gradient_magnitude(photograph.mean(-1), 1.5)
    pale = photograph.max(-1) - photograph.min(-1) < 0.2
    candidate = (rough < 0.05) & (((blue > 0.05) & (brightness > 0.3)) | (pale & (brightness > 0.6)))
    candidate = np.pad(candidate, _MARGIN, mode="edge")  # so that what follows treats edges as the rest
    labels, _ = ndimage.label(ndimage.binary_opening(candidate))
    reaches_top = np.isin(labels, np.setdiff1d(np.unique(labels[: _MARGIN + 3]), 0))
    found = reaches_top | ndimage.binary_closing(reaches_top, iterations=4)
    found = found[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    return np.clip(ndimage.gaussian_filter(found.astype(np.float32), 0.7), 0, 1)


def distance(photograph: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """Distance (h, w) in (0, 1]: it grows with height up to the horizon and with haze; the sky is at 1.

    Haze is the dark channel of He, Sun and Tang (2009), the darkest value nearby.
    """
    height = len(sky)
    upward = np.linspace(1, 0, height, dtype=np.float32)
    rows_of_sky = np.flatnonzero(sky.mean(axis=1) > 0.25)  # the horizon is about where the sky ends
    horizon = max(upward[rows_of_sky[-1]], 0.2) if len(rows_of_sky) else 1.0
    haze = ndimage.minimum_filter(photograph.min(-1), max(3, height // 20))
    haze = ndimage.gaussian_filter(haze, height / 40)
    relative = 0.75 * np.clip(upward / horizon, 0, 1)[:, None] + 0.25 * np.clip(1.5 * haze, 0, 1)
    ground = _NEAREST + (_FURTHEST - _NEAREST) * relative
    return ground * (1 - sky) + sky


def apply(
    picture: np.ndarray,
    sky: np.ndarray,
    distance: np.ndarray,
    weather: Collection[str],
    degrees: Degrees,
    seed: int,
) -> np.ndarray:
    """A picture (h, w, 3) uint8 in other weather.

    Args:
        picture: (h, w, 3) in [0, 1], as stored.
        sky: (h, w), see [`sky`].
        distance: (h, w), see [`distance`].
        weather: of "night", "snow" and "fog", those that there are.
        degrees: how strong they are.
        seed: of the flakes.
    """
    light = np.where(picture <= 0.04045, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4).astype(np.float32)
    air, lamps = _FOG, np.zeros_like(light)
    if "snow" in weather:
        light = _cover(light, sky, degrees.snow)
    if "night" in weather:
        lamps = _lamps(light, sky)
        light, air = _darken(light, sky, degrees.night), _FOG * _MOONLIGHT * 2 ** -(degrees.night + 0.7)
    if "fog" in weather:
        transmission = np.exp(-degrees.fog * distance)[..., None]
        light = light * transmission + air * (1 - transmission)
        lamps = lamps * np.sqrt(transmission)  # they are seen from further than what they do not light
    light = light + lamps
    if "snow" in weather:
        light = _flakes(light, 1.15 * air + 0.03, degrees.snow, seed)
    light = np.clip(light, 0, 1)
    stored = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(stored * 255).astype(np.uint8)


def _cover(light: np.ndarray, sky: np.ndarray, amount: float) -> np.ndarray:
    """Snow on what seems to face upward: bright above and dark below, drawn out sideways, grey, and low."""
    height = len(light)
    tone = ndimage.gaussian_filter(np.sqrt(light @ _LUMINANCE), 0.8)
    down, across = np.gradient(tone)
    lit_from_above = np.tanh(-6 * ndimage.gaussian_filter(down, (1, 0.7)))
    vertical, horizontal = (ndimage.gaussian_filter(np.abs(change), 2) for change in (down, across))
    flat = vertical / (vertical + horizontal + 1e-3)
    colorful = (light.max(-1) - light.min(-1)) / (light.max(-1) + 0.05)
    low = np.linspace(-1, 1, height)[:, None]
    score = 0.9 * lit_from_above + (flat - 0.5) + 0.5 * low - 0.4 * (colorful - 0.5)
    covered = 0.9 / (1 + np.exp(-7 * (score + 1.3 * amount - 1.05)))
    covered = (ndimage.gaussian_filter(covered, 0.4) * (1 - sky))[..., None]
    shade = np.clip(0.75 + 1.2 * (tone - ndimage.gaussian_filter(tone, height / 8)), 0.45, 1)[..., None]
    overcast = (0.55 * amount * sky)[..., None]
    light = light * (1 - overcast) + overcast * (0.35 * _FOG / _FOG.mean() + 0.5 * (light @ _LUMINANCE)[..., None])
    return light * (1 - covered) + _SNOW * shade * covered


def _lamps(light: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """Light of small bright spots, which are still bright at night, and its glow."""
    brightness = light @ _LUMINANCE
    spots = np.clip(3 * (brightness - ndimage.gaussian_filter(brightness, 2.5) - 0.35), 0, 1) * (1 - sky)
    glow = 0.8 * spots + 0.5 * ndimage.gaussian_filter(spots, 2)
    return glow[..., None] * _LAMP


def _darken(light: np.ndarray, sky: np.ndarray, stops: float) -> np.ndarray:
    """Moonlight: dark, blue, with less color and contrast, the sky darkest."""
    grey = (light @ _LUMINANCE)[..., None]
    colors = 0.45 * light + 0.55 * grey
    level = 2**-stops * (1 - 0.7 * sky)[..., None]
    return level * _MOONLIGHT * (colors**1.15 + 0.01)


def _flakes(light: np.ndarray, color: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Flakes at several distances: far ones small and many, near ones large and blurred along their fall."""
    rng = np.random.default_rng(seed)
    height, width, _ = light.shape
    scale = height / 64
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    for count, radius, fall, opacity in _LAYERS:
        alpha = np.zeros((height, width), dtype=np.float32)
        for _ in range(rng.binomial(2 * count, amount / 2)):
            row, column, size = rng.uniform(0, height), rng.uniform(0, width), radius * scale * rng.uniform(0.7, 1.3)
            down = np.maximum(np.abs(rows - row) - fall * scale, 0)  # distance from the line along which it fell
            alpha = np.maximum(alpha, np.clip(0.5 + size - np.hypot(down, columns - column), 0, min(1, 2 * size)))
        alpha = (opacity * alpha)[..., None]
        light = light * (1 - alpha) + color * alpha
    return light
