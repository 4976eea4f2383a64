"""Emoji: drawings of one role by gender, skin tone and vendor, which real images vary one at a time and together.

The drawings are fetched with `npm pack`: Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0), from the packages
emoji-datasource-google and emoji-datasource-twitter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from beds.bed import Attribute, Bed, BedSample
from beds.design_reader import Reader, cached_reader
from beds.emoji import GENDERS, TONES, Drawing, decode, fetch, people, read_package, things
from diffusers_ctx import embedded_base


VENDORS = ("google", "twitter")
DEFAULT, DARK = TONES.index("default"), TONES.index("dark")
TONE = 1  # its column among the attributes
# at 64 pixels the first vendor's golfer shows no skin, and its supervillain wears white paint
NO_SKIN = ("a person golfing", "a supervillain")


class Designs(Bed):
    """Men of default tone by one vendor; interventions make them women, dark, and another vendor's.

    Each combination of interventions is a real drawing of the same role, so compositions and counterfactuals have a
    truth. Contexts show the same roles, or subsets drawn for each of them; files of one name show different roles.

    Args:
        cache_dir: where the packages and the reader are kept.
        random_tone: whether the second intervention, then called `tone`, draws one of five tones. A scene holds the
            tone that it would get, so a counterfactual has one truth, which an image does not show beforehand.

    Raises:
        FileNotFoundError, subprocess.CalledProcessError, ValueError: as [`fetch`] does.
    """

    def __init__(self, cache_dir: str | Path = "runs/sources", random_tone: bool = False):
        self.random_tone = random_tone
        self.name = "designs-random-tone" if random_tone else "designs"
        self.license = "Noto Emoji, Apache-2.0; Twemoji, CC BY 4.0; names of emoji-datasource, MIT"
        woman, tone, vendor = self.concepts = ("woman", "tone" if random_tone else "dark", "vendor")
        self.held_out = ((woman, tone), (woman, vendor), (tone, vendor), (woman, tone, vendor))
        self.cache_dir = Path(cache_dir)
        self._images, self._drawings = _load(self.cache_dir)
        roles = _roles(self._drawings)
        self.captions = [f"a drawing of {phrase}" for phrase in roles.values()]
        self.attributes = (
            Attribute("gender", len(GENDERS), (woman,)),
            Attribute("tone", len(TONES), (tone,)),
            Attribute("vendor", len(VENDORS), (vendor,)),
            Attribute("role", len(roles)),
        )
        self._labels = np.array([_label(vendor, drawing, list(roles)) for vendor, drawing in self._drawings])
        self._complete = ~np.isnan(self._labels).any(1)
        self._rows = np.empty((len(GENDERS), len(TONES), len(VENDORS), len(roles)), np.int64)
        self._rows[tuple(self._labels[self._complete].astype(int).T)] = np.flatnonzero(self._complete)

    def sample(
        self, interventions: Sequence[str] = (), n: int | None = None, seed: int = 0, held_out: bool = False
    ) -> BedSample:
        """See [`Bed.sample`]. There is one image for each role, and fewer of a seed are the first of more."""
        if held_out and len(set(interventions)) < 2:
            raise ValueError("Training may use every image of a single context; only combinations are held out.")
        n = len(self.captions) if n is None else n
        if n > len(self.captions):
            raise ValueError(f"There are {len(self.captions)} images under each intervention, not {n}.")
        generator = np.random.default_rng(seed)
        roles = generator.permutation(len(self.captions))[:n]
        tones = generator.integers(1, len(TONES), n) if self.random_tone else np.full(n, DARK)
        return self._draw(np.stack([roles, tones], 1), interventions)

    def counterfactual(self, sample: BedSample, interventions: Sequence[str]) -> BedSample:
        return self._draw(sample.scenes, interventions)

    def pooled(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        """See [`Bed.pooled`]: people with at most one attribute of an intervention, and everything but people.

        People of no named gender count as women, whom many are drawn like.
        """
        vendor, tone = np.array([(vendor, drawing.tone) for vendor, drawing in self._drawings]).T
        woman = np.array([drawing.gender != "man" for _, drawing in self._drawings])
        rows = np.flatnonzero(woman.astype(int) + (tone != DEFAULT) + (vendor > 0) < 2)
        yield self._images[rows], [f"a drawing of {self._drawings[row][1].phrase}" for row in rows]
        for name in VENDORS:
            entries, files = read_package(fetch(name, self.cache_dir), name)
            shown = [(decode(files[file]), phrase) for file, phrase in things(entries) if file in files]
            yield np.stack([image for image, _ in shown]), [f"a drawing of {phrase}" for _, phrase in shown]

    def unseen(self, interventions: Sequence[str], n: int | None = None, seed: int = 0) -> BedSample:
        return self.sample(interventions, n, seed)  # readers learn from no context and no combination

    def read(self, images: np.ndarray) -> np.ndarray:
        return self.reader.read(images)

    @cached_property
    def reader(self) -> Reader:
        """A classifier of the attributes, see [`lessons`]."""
        vae = AutoencoderKL.from_pretrained(embedded_base("pictures"), subfolder="vae", torch_dtype=torch.float32)
        return cached_reader(self.cache_dir, *self.lessons(), vae.requires_grad_(False))

    def lessons(self) -> tuple[np.ndarray, np.ndarray]:
        """What readers learn from: drawings that no context or combination with default and dark tones shows.

        Of men and women with a role, those are the four tones between, for gender, vendor and role. Their tone is
        not told: it would never be default or darkest. Tone is learned from people of no named gender, from hands,
        and from men and women without a counterpart, each in all six tones.

        Returns:
            images (n, 64, 64, 3) uint8, and labels (n, 4) in the order of `attributes`, NaN where one is not known.
        """
        labels = self._labels.copy()
        labels[self._complete, TONE] = np.nan
        unused = ~self._complete | ~np.isin(self._labels[:, TONE], (DEFAULT, DARK))
        return self._images[unused], labels[unused]

    def _draw(self, scenes: np.ndarray, interventions: Sequence[str]) -> BedSample:
        """The images of scenes (n, 2): the role, and the tone that an intervention gives it."""
        unknown = set(interventions) - set(self.concepts)
        if unknown:
            raise ValueError(f"Unknown concepts {sorted(unknown)}; known are {list(self.concepts)}.")
        woman, tone, vendor = (concept in interventions for concept in self.concepts)
        rows = self._rows[int(woman), scenes[:, 1] if tone else DEFAULT, int(vendor), scenes[:, 0]]
        return BedSample(
            images=self._images[rows],
            captions=[self.captions[role] for role in scenes[:, 0]],
            attributes=self._labels[rows],
            interventions=tuple(concept for concept in self.concepts if concept in interventions),
            scenes=scenes,
        )


def _load(cache_dir: Path) -> tuple[np.ndarray, list[tuple[int, Drawing]]]:
    """Images (n, 64, 64, 3) uint8 of all people and hands by both vendors, and each one's vendor and drawing."""
    images, drawings = [], []
    for vendor, name in enumerate(VENDORS):
        entries, files = read_package(fetch(name, cache_dir), name)
        for drawing in people(entries):
            if drawing.phrase not in NO_SKIN:
                images.append(decode(files[drawing.file]))
                drawings.append((vendor, drawing))
    return np.stack(images), drawings


def _roles(drawings: list[tuple[int, Drawing]]) -> dict[str, str]:
    """Roles that exist as man and woman, with what captions call them."""
    men = {drawing.role: drawing.phrase for _, drawing in drawings if drawing.gender == "man"}
    women = {drawing.role for _, drawing in drawings if drawing.gender == "woman"}
    return {role: phrase for role, phrase in men.items() if role in women}


def _label(vendor: int, drawing: Drawing, roles: list[str]) -> tuple[float, ...]:
    gender = GENDERS.index(drawing.gender) if drawing.gender else np.nan
    role = roles.index(drawing.role) if drawing.role in roles else np.nan
    return gender, drawing.tone, vendor, role
