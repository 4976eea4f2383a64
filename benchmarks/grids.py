"""Grids of samples: plain pictures whose tiles go into the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_ctx.data import quad


COLUMNS = 8
DRAWN = ("obs", "quad1", "quad4", "size", "quad1+quad4", "quad2+size", "quad1+quad3+orientation")


def join_tiles(rows: Sequence[np.ndarray]) -> Image.Image:
    """One picture of rows of images (n, H, W, C) uint8."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def picture_of(file: Path, ending: str = "") -> Path:
    """Where the samples of a results file are drawn: JPEGs, a fifth as large as PNGs of such noisy images."""
    return file.with_name(f"{file.stem}{ending}.jpg")


def save_samples(picture: Image.Image, file: Path) -> None:
    """Writes a picture of samples; edges between colors stay sharp, since colors have all pixels too."""
    picture.convert("RGB").save(file, quality=90, subsampling=0, optimize=True)


def tiles(grid: Image.Image, name: str) -> np.ndarray:
    """The images (COLUMNS, 64, 64, 3) of one of the combinations `DRAWN` in a grid."""
    top, size = DRAWN.index(name) * quad.RESOLUTION, quad.RESOLUTION
    row = np.asarray(grid.convert("RGB"))[top : top + size]
    return row.reshape(size, -1, size, 3).swapaxes(0, 1)
