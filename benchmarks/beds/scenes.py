"""Rendered 3D: a toy under a colored spotlight before a colored background, with real shading and shadow.

After 3DIdent (Zimmermann et al. 2021, arXiv 2102.08850), whose contexts Markham et al. (CLeaR 2026, arXiv 2507.04754)
intervene on: the hue of the background, of the object and of the spotlight. Hues are normal and independent, and an
intervention moves one. Body, position, rotation and the light's direction vary in all contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from beds.bed import Attribute, Bed, BedSample
from beds.convnet import ConvReader
from beds.renderer import BODIES, View, render


CONCEPTS = ("bg", "obj", "sl")
HUES = {"bg": (0.60, 0.35), "obj": (0.08, -0.12), "sl": (0.14, 0.50)}  # means, observational and intervened
DEVIATION = 0.03  # of all hues
FIRST_HELD_OUT_SEED = 1_000_000
_READING_SEED = 2_000_000
_READING_SCENES = 1500
_READING_DEVIATION = 0.05  # wider, so that a reader also knows hues that a model gets wrong
_READING_SIZE = 32


@dataclass(frozen=True)
class Toys:
    """What images show apart from the interventions.

    Attributes:
        body: (n,), places in [`BODIES`].
        place: (n, 2), to the right and away from the viewer.
        angles: (n, 2), of the toy and of the light, in degrees.
        noise: (n, 3), standard normal, of each concept's hue.
        seed: (n,), of the renderer.
    """

    body: np.ndarray
    place: np.ndarray
    angles: np.ndarray
    noise: np.ndarray
    seed: np.ndarray


class Scenes(Bed):
    """Rendered toys; every combination and every counterfactual has a truth.

    Hues are in turns of the color circle, where -0.12 is the pink of 0.88. It takes mitsuba
    (`pip install "diffusers-ctx[scenes]"`).

    Args:
        resolution: of images, in pixels.
    """

    name = "scenes"
    concepts = CONCEPTS
    attributes = (
        *(Attribute(name, concepts=(name,)) for name in CONCEPTS),
        Attribute("body", classes=len(BODIES)),
        Attribute("x"),
        Attribute("depth"),
    )
    held_out = (*combinations(CONCEPTS, 2), CONCEPTS)
    license = "Apache-2.0: rendered by benchmarks/beds/renderer.py"

    def __init__(self, resolution: int = 64):
        self.resolution = resolution

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Toys in some colors, 300 by default; the same seed gives the same toys; see [`Bed.sample`]."""
        if not 0 <= seed < FIRST_HELD_OUT_SEED:
            raise ValueError(f"`seed` is {seed}; give one from 0 to {FIRST_HELD_OUT_SEED - 1}.")
        toys = draw_toys(300 if n is None else n, seed + held_out * FIRST_HELD_OUT_SEED)
        return self._render(toys, interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        return self._render(sample.scenes, interventions)

    def read(self, images: np.ndarray) -> np.ndarray:
        small = _reduced(images)
        return np.column_stack([reader.predict(small) for reader in self._readers]).astype(float)

    @cached_property
    def _readers(self) -> list[ConvReader]:
        """Learned on toys of their own, whose hues are intervened on at random and vary more."""
        toys = draw_toys(_READING_SCENES, _READING_SEED)
        moved = np.random.default_rng(_READING_SEED).integers(2, size=toys.noise.shape).astype(bool)
        hues = hues_of(toys.noise * _READING_DEVIATION / DEVIATION, moved)
        images = _reduced(self._pictures(toys, hues))
        targets = _attributes(toys, hues)
        return [
            ConvReader(classes=attribute.classes).fit(images, _typed(targets[:, column], attribute.classes))
            for column, attribute in enumerate(self.attributes)
        ]

    def _render(self, toys: Toys, interventions: Sequence[str]) -> BedSample:
        if unknown := [name for name in interventions if name not in self.concepts]:
            raise ValueError(f"Unknown concepts {unknown}; scenes have {list(self.concepts)}.")
        hues = hues_of(toys.noise, np.isin(CONCEPTS, interventions))
        captions = [f"a toy made of a {BODIES[body]}" for body in toys.body]
        return BedSample(
            self._pictures(toys, hues), captions, _attributes(toys, hues), tuple(interventions), scenes=toys
        )

    def _pictures(self, toys: Toys, hues: np.ndarray) -> np.ndarray:
        views = [
            View(BODIES[body], *map(float, (*place, *angles, *hue)), seed=int(seed))
            for body, place, angles, hue, seed in zip(toys.body, toys.place, toys.angles, hues, toys.seed)
        ]
        pictures = [render(view, self.resolution) for view in views]
        return np.array(pictures, dtype=np.uint8).reshape(-1, self.resolution, self.resolution, 3)


def draw_toys(n: int, seed: int) -> Toys:
    """`n` toys; fewer are the first of more."""
    columns = np.random.default_rng(seed).random((n, 6))
    return Toys(
        body=(columns[:, 0] * len(BODIES)).astype(int),
        place=(2 * columns[:, 1:3] - 1) * (0.9, 0.7),
        angles=360 * columns[:, 3:5],
        noise=np.random.default_rng((seed, 1)).standard_normal((n, len(CONCEPTS))),
        seed=(columns[:, 5] * 2**31).astype(int),
    )


def hues_of(noise: np.ndarray, intervened: np.ndarray) -> np.ndarray:
    """Hues (n, 3) in turns, of standard normal noise (n, 3) and which concepts are intervened on, (n, 3) or (3,)."""
    means = np.array([HUES[name] for name in CONCEPTS])
    return np.where(intervened, means[:, 1], means[:, 0]) + DEVIATION * noise


def _attributes(toys: Toys, hues: np.ndarray) -> np.ndarray:
    return np.column_stack([hues, toys.body, toys.place])


def _typed(values: np.ndarray, classes: int | None) -> np.ndarray:
    return values.astype(int) if classes else values


def _reduced(images: np.ndarray) -> np.ndarray:
    """Images (n, R, R, 3) as (n, 32, 32, 3), by the mean of squares of pixels."""
    n, size = images.shape[:2]
    side = size // _READING_SIZE
    squares = images.reshape(n, _READING_SIZE, side, _READING_SIZE, side, 3)
    return np.rint(squares.mean((2, 4))).astype(np.uint8)
