"""Real photographs; night, snow and fog by operations on them.

A scene is a crop of a photograph and how strong each operation would be, so every counterfactual is known. Training
folders share photographs, not crops; held-out images are of other photographs. See `photograph_sources` for what they
are and their licenses, and `weather` for the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.ensemble import ExtraTreesClassifier

from beds import weather
from beds.bed import Attribute, Bed, BedSample
from beds.photograph_sources import HELD_OUT, LICENCE, READING, TRAINING, fetch


WEATHER = ("night", "snow", "fog")
FIRST_HELD_OUT_SEED = 1_000_000
_LARGEST = 640  # pixels of a photograph's longer side that is kept in memory
_WORKING_SIZE = 320  # when sky and distance are estimated
_SMALLEST_CROP = 0.6  # of a photograph's shorter side
_READING_SCENES = 340  # each seen in all eight combinations of weather
_READING_SEED = 2_000_000


@dataclass(frozen=True)
class Scene:
    """What an image shows apart from the weather.

    Attributes:
        photograph: its name in `photograph_sources`.
        box: left, upper, right and lower edge of a square, as shares of the photograph's width and height.
        mirrored: left is right.
        degrees: how strong night, snow and fog are, if they are.
        seed: of the snowflakes.
    """

    photograph: str
    box: tuple[float, float, float, float]
    mirrored: bool
    degrees: weather.Degrees
    seed: int


class PhotographsBed(Bed):
    """Photographs by day, and at night, in snow and in fog.

    Args:
        cache_dir: folder of the package of photographs; it is fetched when the first image is drawn.
        resolution: of images, in pixels.
    """

    name = "photographs"
    concepts = WEATHER
    attributes = tuple(Attribute(name, classes=2, concepts=(name,)) for name in WEATHER)
    held_out = (*combinations(WEATHER, 2), WEATHER)
    license = LICENCE

    def __init__(self, cache_dir: str | Path = "runs/sources", resolution: int = 64):
        self.cache_dir = Path(cache_dir)
        self.resolution = resolution
        self._layers: dict[str, np.ndarray] = {}

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Crops of photographs in some weather, 100 by default; see [`Bed.sample`].

        The same seed gives the same scenes in all weather. No photograph is seen a second time before all were once.
        """
        if not 0 <= seed < FIRST_HELD_OUT_SEED:
            raise ValueError(f"`seed` is {seed}; give one from 0 to {FIRST_HELD_OUT_SEED - 1}.")
        photographs, first = (HELD_OUT, FIRST_HELD_OUT_SEED) if held_out else (TRAINING, 0)
        return self._draw(self._scenes(photographs, 100 if n is None else n, first + seed), interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        return self._draw(sample.scenes, interventions)

    def read(self, images: np.ndarray) -> np.ndarray:
        return np.column_stack(self._reader.predict(_statistics(images)).T).astype(float)

    @cached_property
    def _reader(self) -> ExtraTreesClassifier:
        """Learned on photographs that neither training nor held-out images show, in all weather."""
        scenes = self._scenes(READING, _READING_SCENES, _READING_SEED)
        samples = [self._draw(scenes, interventions) for interventions in [*self.contexts.values(), *self.held_out]]
        reader = ExtraTreesClassifier(n_estimators=200, min_samples_leaf=2, random_state=0)
        features = np.concatenate([_statistics(sample.images) for sample in samples])
        return reader.fit(features, np.concatenate([sample.attributes for sample in samples]))

    def _scenes(self, photographs: dict[str, str], n: int, seed: int) -> list[Scene]:
        rng = np.random.default_rng(seed)
        rounds = -(-n // len(photographs))
        order = [name for _ in range(rounds) for name in rng.permutation(list(photographs))][:n]
        return [self._scene(name, rng) for name in order]

    def _scene(self, name: str, rng: np.random.Generator) -> Scene:
        height, width = self._photograph(name).shape[:2]
        side = rng.uniform(_SMALLEST_CROP, 1) * min(height, width)
        left, upper = rng.uniform(0, width - side), rng.uniform(0, height - side)
        box = (left / width, upper / height, (left + side) / width, (upper + side) / height)
        return Scene(str(name), box, bool(rng.integers(2)), weather.Degrees.draw(rng), int(rng.integers(2**32)))

    def _draw(self, scenes: list[Scene], interventions: Sequence[str]) -> BedSample:
        unknown = [name for name in interventions if name not in self.concepts]
        if unknown:
            raise ValueError(f"Unknown concepts {unknown}; photographs have {list(self.concepts)}.")
        size = (len(scenes), self.resolution, self.resolution, 3)
        images = np.empty(size, dtype=np.uint8)
        for row, scene in enumerate(scenes):
            crop = self._crop(scene)
            images[row] = weather.apply(
                crop[..., :3], crop[..., 3], crop[..., 4], interventions, scene.degrees, scene.seed
            )
        shown = {**TRAINING, **READING, **HELD_OUT}
        captions = [f"a photo of {shown[scene.photograph]}" for scene in scenes]
        attributes = np.tile([float(name in interventions) for name in self.concepts], (len(scenes), 1))
        return BedSample(images, captions, attributes, tuple(interventions), scenes)

    def _crop(self, scene: Scene) -> np.ndarray:
        """Color in [0, 1], sky and distance (R, R, 5) of a scene by day."""
        layers = self._photograph(scene.photograph)
        height, width = layers.shape[:2]
        box = tuple(edge * size for edge, size in zip(scene.box, (width, height, width, height)))
        size = (self.resolution, self.resolution)
        resized = [
            Image.fromarray(layer).resize(size, Image.Resampling.BOX, box=box) for layer in np.moveaxis(layers, 2, 0)
        ]
        crop = np.stack([np.asarray(layer) for layer in resized], axis=-1)
        return crop[:, ::-1] if scene.mirrored else crop

    def _photograph(self, name: str) -> np.ndarray:
        """Color in [0, 1], sky and distance (h, w, 5) of a whole photograph, kept in memory."""
        if name not in self._layers:
            picture = Image.open(fetch(self.cache_dir) / f"{name}.webp").convert("RGB")
            picture.thumbnail((_LARGEST, _LARGEST))
            small = picture.copy()
            small.thumbnail((_WORKING_SIZE, _WORKING_SIZE))
            color = np.asarray(small, dtype=np.float32) / 255
            sky = weather.sky(color)
            estimated = (
                Image.fromarray(layer).resize(picture.size, Image.Resampling.BILINEAR)
                for layer in (sky, weather.distance(color, sky))
            )
            self._layers[name] = np.dstack([np.asarray(picture, dtype=np.float32) / 255, *estimated])
        return self._layers[name]


def _statistics(images: np.ndarray) -> np.ndarray:
    """Numbers (n, 40) that tell weather: of each third of images (n, R, R, 3) from above, and of specks."""
    pixels = images.astype(np.float32) / 255
    grey, darkest, brightest = pixels.mean(-1), pixels.min(-1), pixels.max(-1)
    saturation = (brightest - darkest) / (brightest + 0.05)
    blue = (pixels[..., 2] - pixels[..., 0]) / (brightest + 0.05)
    specks = grey - ndimage.median_filter(grey, (1, 5, 5))
    dark = ndimage.minimum_filter(darkest, (1, 7, 7))
    columns = [np.quantile(specks, q, axis=(1, 2)) for q in (0.9, 0.97, 0.99, 0.995)]
    for third in np.array_split(np.arange(images.shape[1]), 3):
        columns += [values[:, third].mean((1, 2)) for values in (grey, dark, saturation, blue)]
        columns += [np.quantile(grey[:, third], q, axis=(1, 2)) for q in (0.02, 0.25, 0.75, 0.98)]
        columns += [grey[:, third].std((1, 2)), abs(np.diff(grey[:, third], axis=2)).mean((1, 2))]
        columns += [(brightest[:, third] * (saturation[:, third] < 0.15)).mean((1, 2)), specks[:, third].std((1, 2))]
    return np.column_stack(columns)
