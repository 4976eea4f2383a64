"""Grids of samples: plain pictures whose tiles go into the figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffusers_ctx.data import quad


COLUMNS = 8
DRAWN = ("obs", "quad1", "quad4", "size", "quad1+quad4", "quad2+size", "quad1+quad3+orientation")


def join_tiles(rows: Sequence[np.ndarray]) -> Image.Image:
    """One picture of rows of images (n, H, W, C) uint8."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def tiles(grid: Image.Image, name: str) -> np.ndarray:
    """The images (COLUMNS, 64, 64, 3) of one of the combinations `DRAWN` in a grid."""
    top, size = DRAWN.index(name) * quad.RESOLUTION, quad.RESOLUTION
    row = np.asarray(grid.convert("RGB"))[top : top + size]
    return row.reshape(size, -1, size, 3).swapaxes(0, 1)
