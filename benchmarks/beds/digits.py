"""The test bed `digits`: real handwriting, and operations on it.

The digits are MNIST's (handwriting.py). The contexts are those of Markham et al. (CLeaR 2026, arXiv 2507.04754):
`obs` are digits as they are, and each other context has one operation (strokes.py) of random degree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from beds import strokes
from beds.bed import Attribute, BedSample
from beds.convnet import ConvReader
from beds.handwriting import HandwritingBed


DEGREES = {  # ranges of uniform distributions
    "scaled": (0.55, 0.8),  # factor of width and height
    "shear": (0.25, 0.55),  # pixels to the right for each pixel up
    "right": (1.5, 3.5),  # pixels of the shift
    "down": (1.5, 3.5),
    "swelling": (1.8, 2.6),  # strength
    "where": (0.0, 1.0),  # the swelling is on the stroke
    "thickening": (0.6, 1.0),  # share of the mean thickness that is added
    "thinning": (0.3, 0.5),  # share of the mean thickness that is taken away
}


@dataclass(frozen=True)
class DigitScenes:
    """What images show apart from the interventions.

    Attributes:
        rows: (n,), which of the digits they show.
        degrees: (n,) of each operation in `DEGREES`, should it be applied.
    """

    rows: np.ndarray
    degrees: dict[str, np.ndarray]


class Digits(HandwritingBed):
    """Real handwriting under image operations.

    Thickness is set by `thickening` and `thinning` alike, and the operations change more than one attribute: `scaled`
    makes strokes thinner, too. The true value of a measured attribute is the measurement on the drawing before it is
    reduced to 32 × 32 pixels.
    """

    name = "digits"
    concepts = ("scaled", "shear", "shift", "swelling", "thickening", "thinning")
    attributes = (
        Attribute("digit", classes=10),
        Attribute("thickness", concepts=("thickening", "thinning")),
        Attribute("slant", concepts=("shear",)),
        Attribute("size", concepts=("scaled",)),
        Attribute("x", concepts=("shift",)),
        Attribute("y", concepts=("shift",)),
        Attribute("bulge", concepts=("swelling",)),
    )
    held_out = tuple(pair for pair in combinations(concepts, 2) if pair != ("thickening", "thinning"))

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Digits drawn without replacement, from 2,500 or 1,000 held out; the same ones under any interventions."""
        rng = np.random.default_rng([seed, held_out])
        rows = self.draw_rows(rng, n, held_out)
        degrees = {name: rng.uniform(*limits, len(rows)) for name, limits in DEGREES.items()}
        return self._draw(DigitScenes(rows, degrees), interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        """The same digits under other operations, of the degrees that they would have had."""
        return self._draw(sample.scenes, interventions)

    def read(self, images: np.ndarray) -> np.ndarray:
        """The digit by a network that learned from 1,500 others, the rest by measurement; NaN if nothing is drawn."""
        grey = images.mean(-1).round().astype(np.uint8)
        measured = [strokes.measure(strokes.enlarge(picture)) for picture in grey]
        return np.column_stack([self._reader.predict(grey), measured])

    def _draw(self, scenes: DigitScenes, interventions: Sequence[str]) -> BedSample:
        known = self.in_order(interventions)
        drawings = [
            operate(strokes.enlarge(picture), known, {name: values[row] for name, values in scenes.degrees.items()})
            for row, picture in enumerate(self.pictures(scenes.rows))
        ]
        measured = [strokes.measure(drawing) for drawing in drawings]
        return BedSample(
            images=np.stack([strokes.reduce(drawing) for drawing in drawings])[..., None].repeat(3, -1),
            captions=self.captions(scenes.rows),
            attributes=np.column_stack([self.source.labels[scenes.rows], measured]),
            interventions=known,
            scenes=scenes,
        )

    @cached_property
    def _reader(self) -> ConvReader:
        reader = ConvReader(classes=10, augment=True, epochs=40)
        return reader.fit(self.pictures(self.reader_rows), self.source.labels[self.reader_rows])


def operate(drawing: np.ndarray, interventions: Sequence[str], degrees: dict[str, float]) -> np.ndarray:
    """The drawing after the operations: strokes first, then what moves the whole digit.

    Args:
        drawing: an array as in strokes.py.
        interventions: which operations.
        degrees: one for each name in `DEGREES`.
    """
    if "swelling" in interventions:
        drawing = strokes.swell(drawing, degrees["swelling"], degrees["where"])
    if "thickening" in interventions:
        drawing = strokes.thicken(drawing, degrees["thickening"])
    if "thinning" in interventions:
        drawing = strokes.thin(drawing, degrees["thinning"])
    return strokes.transform(
        drawing,
        scale=degrees["scaled"] if "scaled" in interventions else 1.0,
        shear=degrees["shear"] if "shear" in interventions else 0.0,
        shift=(degrees["right"], degrees["down"]) if "shift" in interventions else (0.0, 0.0),
    )
