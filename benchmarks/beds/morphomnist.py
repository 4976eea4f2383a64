"""The counterfactual benchmark on MorphoMNIST of Melistas et al. (NeurIPS 2024, arXiv 2403.20287).

Measures effectiveness, composition, reversibility and minimality of a function `counterfactual(images, interventions)`
on 10,000 test digits, whose thickness causes their intensity. Two references are doing nothing, and the image
operations themselves. The folder holds the files of `FILES`, which Melistas et al. publish (MIT; the digits
are MNIST's, CC BY-SA 3.0). Methods in `PUBLISHED` get every attribute of every image and the causal graph; a
context adapter gets neither.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import expit, logit
from sklearn.decomposition import PCA

from beds import strokes
from beds.convnet import ConvReader
from beds.handwriting import pad


FILES = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", "t10k-morpho.csv")
PUBLISHED = {  # the authors' slides; errors by networks that they trained as readers
    "VAE": {"thickness": 0.109, "intensity": 5.33, "digit": 0.775, "composition": (2.60, 7.70)},
    "HVAE": {"thickness": 0.086, "intensity": 3.52, "digit": 0.972, "composition": (0.438, 1.55)},
    "GAN": {"thickness": 0.228, "intensity": 15.1, "digit": 0.451, "composition": (3.81, 11.7)},
}

Values = Mapping[str, np.ndarray]
Counterfactual = Callable[[np.ndarray, Values], np.ndarray]
"""Images (n, 32, 32, 3) uint8 and the values (n,) of what is intervened on, to images; no values: no intervention."""


@dataclass(frozen=True)
class MorphoDigits:
    """Test digits.

    Attributes:
        images: (n, 32, 32, 3) uint8.
        values: (n,) for each of `thickness` (pixels), `intensity` (0 to 255) and `digit`.
    """

    images: np.ndarray
    values: dict[str, np.ndarray]

    def first(self, n: int) -> MorphoDigits:
        return MorphoDigits(self.images[:n], {name: values[:n] for name, values in self.values.items()})


def load(folder: str | Path) -> MorphoDigits:
    """The digits in a folder with the files of `FILES`.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if one is no IDX file, or they do not belong together.
    """
    images, labels = (_read_idx(Path(folder) / name) for name in FILES[:2])
    table = np.genfromtxt(Path(folder) / FILES[2], delimiter=",", names=True, ndmin=1)
    if not len(images) == len(labels) == len(table):
        raise ValueError(f"{folder} has {len(images)} images, {len(labels)} labels and {len(table)} measurements")
    return MorphoDigits(
        images=pad(images)[..., None].repeat(3, -1),
        values={"thickness": table["thickness"], "intensity": table["intensity"], "digit": labels.astype(int)},
    )


def intensity_of(thickness: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The mechanism of the data set (Pawlowski et al., NeurIPS 2020, section 4): thickness causes intensity."""
    return 191 * expit(0.5 * noise + 2 * thickness - 5) + 64


def noise_of(thickness: np.ndarray, intensity: np.ndarray) -> np.ndarray:
    """The noise, standard normal, that gave a thickness its intensity."""
    share = np.clip((intensity - 64) / 191, 1e-4, 1 - 1e-4)  # readings can be outside
    return 2 * (logit(share) - 2 * thickness + 5)


def effect(values: Values, interventions: Values) -> dict[str, np.ndarray]:
    """The true counterfactual values of all attributes."""
    after = {**values, **interventions}
    if "thickness" in interventions and "intensity" not in interventions:
        noise = noise_of(values["thickness"], values["intensity"])
        after["intensity"] = intensity_of(after["thickness"], noise)
    return after


class MorphoReaders:
    """Readers of thickness, intensity and digit.

    Intensity is the median of what is brighter than half of an image's range, as the data set defines it. Thickness
    and digit are read by networks; those that read one half of the digits learned from the other half.

    Args:
        digits: the test digits.
        epochs: passes of the networks.
    """

    def __init__(self, digits: MorphoDigits, epochs: int = 5) -> None:
        grey = _grey(digits.images)
        self._half = np.arange(len(grey)) % 2
        self._networks = {
            (name, half): ConvReader(classes, epochs=epochs).fit(
                grey[self._half != half], digits.values[name][self._half != half]
            )
            for name, classes in (("thickness", None), ("digit", 10))
            for half in (0, 1)
        }

    def read(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Values (n,) of images (n, 32, 32, 3) uint8: the first of the digits in their order, or counterfactuals."""
        grey = _grey(images)
        read = {"intensity": read_intensity(grey)}
        for name in ("thickness", "digit"):
            read[name] = np.empty(len(grey))
            for half in (0, 1):
                rows = self._half[: len(grey)] == half
                read[name][rows] = self._networks[name, half].predict(grey[rows])
        return read


def read_intensity(grey: np.ndarray) -> np.ndarray:
    """The median of what is brighter than half the range, of grey images (n, R, R) uint8."""
    return np.array([np.median(image[image >= image.min() + np.ptp(image) / 2]) for image in grey])


def evaluate(
    counterfactual: Counterfactual,
    digits: MorphoDigits,
    readers: MorphoReaders,
    interventions: Sequence[str] = ("thickness", "intensity"),
    seed: int = 0,
) -> dict[str, Any]:
    """Measures a function on the axioms of counterfactuals.

    Each intervention gives every digit the value of another one. *Effectiveness* is the mean absolute error of
    thickness and intensity, and the share of right digits, as readers see them; under an intervention on thickness
    intensity has to follow. *Composition* is the mean absolute difference of pixels, 0 to 255, after one and after
    ten rounds of no intervention; *reversibility* that after an intervention and one back; *minimality* the
    counterfactual latent divergence, see [`latent_divergence`].

    Args:
        counterfactual: the function.
        digits: what it is given.
        readers: of these digits.
        interventions: which attributes are intervened on, one at a time.
        seed: of the values.
    """
    rng = np.random.default_rng(seed)
    metrics: dict[str, Any] = {"effectiveness": {}, "reversibility": {}, "minimality": {}}
    for name in interventions:
        targets = {name: rng.permutation(digits.values[name])}
        images = counterfactual(digits.images, targets)
        back = counterfactual(images, {name: digits.values[name]})
        metrics["effectiveness"][name] = errors(readers.read(images), effect(digits.values, targets))
        metrics["reversibility"][name] = _difference(digits.images, back)
        metrics["minimality"][name] = latent_divergence(
            digits.images, images, _bins(name, digits.values[name]), _bins(name, targets[name])
        )
    rounds = [digits.images]
    for _ in range(10):
        rounds.append(counterfactual(rounds[-1], {}))
    metrics["composition"] = {count: _difference(digits.images, rounds[count]) for count in (1, 10)}
    return metrics


def errors(read: Values, true: Values) -> dict[str, float]:
    """Mean absolute errors of thickness and intensity, share of right digits."""
    return {
        "thickness": float(np.abs(read["thickness"] - true["thickness"]).mean()),
        "intensity": float(np.abs(read["intensity"] - true["intensity"]).mean()),
        "digit": float((read["digit"] == true["digit"]).mean()),
    }


def latent_divergence(
    images: np.ndarray, counterfactuals: np.ndarray, bins: np.ndarray, target_bins: np.ndarray, dimensions: int = 16
) -> float:
    """Mean counterfactual latent divergence (Sanchez and Tsaftaris, CLeaR 2022), 0 to 1, where less is better.

    For each image, log(0.8 exp p + 0.2 exp q): p is the share of real images with the target value that are nearer to
    it than its counterfactual is, q the share of those with its own value that are farther. Weights are those of
    Melistas et al.; distances are L1 in whitened principal components of the images, theirs in networks of their own,
    so that numbers do not compare with theirs.

    Args:
        images: (n, H, W, 3) uint8.
        counterfactuals: of the same shape.
        bins: (n,) integers, in which bin of the attribute each image is.
        target_bins: (n,), and its counterfactual should be.
        dimensions: principal components.
    """
    code = PCA(dimensions, whiten=True, random_state=0).fit(_flat(images))
    real, other = code.transform(_flat(images)), code.transform(_flat(counterfactuals))
    moved = np.abs(real - other).sum(1)
    divergence = np.empty(len(images))
    for own in np.unique(bins):
        rows = np.flatnonzero(bins == own)
        distances = cdist(real[rows], real, "cityblock")
        farther = (distances[:, rows] >= moved[rows, None]).mean(1)
        nearer = [(distances[place, bins == target_bins[row]] <= moved[row]).mean() for place, row in enumerate(rows)]
        divergence[rows] = np.log(0.8 * np.exp(nearer) + 0.2 * np.exp(farther))
    return float(divergence.mean())


def do_nothing(images: np.ndarray, interventions: Values) -> np.ndarray:
    """A reference: the images as they are."""
    return images


class Operations:
    """A reference that is given the graph and the mechanism: image operations that set thickness and intensity.

    Args:
        readers: by which it knows what an image has.
    """

    def __init__(self, readers: MorphoReaders) -> None:
        self.readers = readers

    def __call__(self, images: np.ndarray, interventions: Values) -> np.ndarray:
        if not interventions:
            return images
        before = self.readers.read(images)
        after = effect(before, interventions)
        pictures = _grey(images)
        if "thickness" in interventions:
            widths = after["thickness"] - before["thickness"]
            drawings = [
                strokes.change_thickness(strokes.enlarge(picture), width) for picture, width in zip(pictures, widths)
            ]
            pictures = np.stack([strokes.reduce(drawing) for drawing in drawings])
        return set_intensity(pictures, after["intensity"])[..., None].repeat(3, -1)


def set_intensity(grey: np.ndarray, intensity: np.ndarray) -> np.ndarray:
    """Grey images (n, R, R) uint8, scaled to intensities (n,)."""
    factor = intensity / np.maximum(read_intensity(grey), 1)
    return np.clip(np.round(grey * factor[:, None, None]), 0, 255).astype(np.uint8)


def render_table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The published metrics and those of [`evaluate`], by name, as a table in Markdown."""
    lines = [
        "| | thickness under do(thickness) | intensity under do(intensity) | intensity under do(thickness) "
        "| composition after 1 | after 10 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in PUBLISHED.items():
        first, tenth = row["composition"]
        lines.append(f"| {name}, published | {row['thickness']} | {row['intensity']} | | {first} | {tenth} |")
    for name, metrics in measured.items():
        effects, composition = metrics["effectiveness"], metrics["composition"]
        lines.append(
            f"| {name} | {effects['thickness']['thickness']:.3f} | {effects['intensity']['intensity']:.2f} "
            f"| {effects['thickness']['intensity']:.2f} | {composition[1]:.3f} | {composition[10]:.3f} |"
        )
    return "\n".join(lines)


def _read_idx(path: Path) -> np.ndarray:
    """Bytes of an IDX file: two zeros, a type, the number of axes, their lengths, the data."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == b"\x00\x00\x08" else 0
    shape = np.frombuffer(content, ">u4", axes, offset=4)
    if not axes or len(content) != 4 + 4 * axes + shape.prod():
        raise ValueError(f"{path} is no IDX file of bytes")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _bins(name: str, values: np.ndarray) -> np.ndarray:
    """Classes as they are, numbers in tenths of their distribution."""
    return values if name == "digit" else np.searchsorted(np.quantile(values, np.linspace(0.1, 0.9, 9)), values)


def _grey(images: np.ndarray) -> np.ndarray:
    return images.mean(-1).round().astype(np.uint8)


def _flat(images: np.ndarray) -> np.ndarray:
    return _grey(images).reshape(len(images), -1) / 255


def _difference(images: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(images.astype(float) - others).mean())
