"""What all test beds have in common: images by context, true compositions and counterfactuals, and readers."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_ctx.plot import draw_grid


@dataclass(frozen=True)
class BedSample:
    """Images of one context.

    Attributes:
        images: (n, R, R, 3) uint8.
        captions: n of them, which do not say what was intervened on.
        attributes: (n, A), the true value of each attribute; NaN where it is not known.
        interventions: what was intervened on.
        scenes: what each image shows apart from the interventions; [`Bed.counterfactual`] needs it.
    """

    images: np.ndarray
    captions: list[str]
    attributes: np.ndarray
    interventions: tuple[str, ...]
    scenes: Any

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Attribute:
    """A property of images that a reader reads off pixels.

    Attributes:
        name: what it is called.
        classes: how many classes it has; `None` for a real number.
        concepts: the concepts that set it.
    """

    name: str
    classes: int | None = None
    concepts: tuple[str, ...] = ()


class Bed(ABC):
    """A test bed.

    Attributes:
        name: of its folder of results.
        resolution: height and width of its images, in pixels.
        concepts: what can be intervened on.
        attributes: what is read off images.
        held_out: combinations of interventions that no training image shows, pairs first.
        license: of the pictures, and where they come from.
    """

    name: str
    resolution: int = 64
    concepts: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    held_out: tuple[tuple[str, ...], ...]
    license: str

    @property
    def contexts(self) -> dict[str, tuple[str, ...]]:
        """The contexts of training images: `obs`, and one for each concept."""
        return {"obs": (), **{concept: (concept,) for concept in self.concepts}}

    @abstractmethod
    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """Real images under interventions.

        Args:
            interventions: names of concepts; one, none, or a combination in `held_out`.
            n: how many; by default all that there are.
            seed: of what is drawn. Contexts of a training set share scenes only where the bed says so.
            held_out: whether the images may not be among any training set's.

        Raises:
            ValueError: if a concept is unknown, or there are too few images.
        """

    @abstractmethod
    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        """What a sample's images would have been under other interventions.

        Raises:
            ValueError: if the bed has no truth about it.
        """

    @abstractmethod
    def read(self, images: np.ndarray) -> np.ndarray:
        """Values (n, A) of the attributes, read off images (n, R, R, 3) uint8; classes as their numbers.

        Readers learn on real images that no training set has; `reading_error` says how good they are.
        """

    def unseen(self, interventions: Sequence[str], n: int | None = None, seed: int = 0) -> BedSample:
        """Real images that readers have not learned from; see `sample`."""
        return self.sample(interventions, n, seed, held_out=True)

    def reading_error(self, sample: BedSample) -> dict[str, float]:
        """How wrong readers are on real images, by attribute: share of wrong classes, or mean absolute error."""
        read = self.read(sample.images)
        return {
            attribute.name: float(
                np.nanmean(
                    (read[:, column] != sample.attributes[:, column])[~np.isnan(sample.attributes[:, column])]
                    if attribute.classes
                    else np.abs(read[:, column] - sample.attributes[:, column])
                )
            )
            for column, attribute in enumerate(self.attributes)
        }

    def training_sample(self, context: str, n: int | None = None, seed: int = 0) -> BedSample:
        """The images of one training folder, `n` or all; different seeds and contexts have different ones."""
        number = list(self.contexts).index(context)
        return self.sample(self.contexts[context], n, training_seed(seed, number))

    def pooled(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Parts of images (n, R, R, 3) uint8 and captions that a base may learn from: no held-out combination."""
        for context in self.contexts:
            sample = self.training_sample(context)
            yield sample.images, sample.captions

    def write_folders(self, root: str | Path, n: int | None = None, seed: int = 0) -> Path:
        """Writes training images and captions, one folder per context; returns `root`."""
        for context in self.contexts:
            sample = self.training_sample(context, n, seed)
            write_folder(Path(root) / context, sample.images, sample.captions)
        return Path(root)

    def contact_sheet(self, columns: int = 12, seed: int = 0) -> Image.Image:
        """A row of real images for each context and held-out combination."""
        combinations = [*self.contexts.values(), *self.held_out]
        rows = [self.sample(interventions, columns, seed).images for interventions in combinations]
        return draw_grid(rows, ["+".join(interventions) or "obs" for interventions in combinations])


def write_folder(folder: Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Writes images (n, R, R, 3) uint8 and their captions, in place of those written before."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("[0-9]*.png"):  # of a larger set, they would be images without a caption
        earlier.unlink()
    names = [f"{row:05d}.png" for row in range(len(images))]
    for name, image in zip(names, images):
        Image.fromarray(image).save(folder / name)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *zip(names, captions)])


def training_seed(seed: int, context: int) -> int:
    """The seed of a context's images, which no other seed of a run or context has."""
    return 100 * seed + context
