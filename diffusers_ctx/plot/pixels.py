"""A plain picture of images, pixel by pixel: what training and evaluation write, also where matplotlib is missing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .labels import font_for, printable


_LABEL_HEIGHT = 14


def draw_grid(rows: Sequence[np.ndarray], labels: Sequence[str], scale: int = 1) -> Image.Image:
    """One picture of rows of images (n, H, W, 3) uint8, each under its label; `scale` enlarges pixels.

    Labels may have the letters that [`labels.printable`] leaves as they are.
    """
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    columns = max(map(len, rows))
    grid = Image.new("RGB", (columns * width, len(rows) * (height + _LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (images, label) in enumerate(zip(rows, labels)):
        top = index * (height + _LABEL_HEIGHT)
        text = printable(label)
        draw.text((2, top + 1), text, font=font_for(text), fill="black")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (column * width, top + _LABEL_HEIGHT))
    return grid
