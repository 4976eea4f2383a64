"""Pictures of samples: a row per context, a seed per column."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..autoencoding import decode_latents
from .images import to_uint8


_LABEL_HEIGHT = 14
_FONT_SIZE = 10
_MISSING = "\U0010ffff"  # no character, so no font has it


def sample_rows(
    pipeline: Any,
    contexts: Sequence[Sequence[str]],
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    resolution: int | None = None,
) -> list[np.ndarray]:
    """Images (len(prompts), H, W, 3) uint8 for each context, with the same prompts and the same noise in every row.

    The noise fits the prompts if the adapter learned captions, as in any call.

    Args:
        pipeline: a pipeline with a context adapter.
        contexts: what each row intervenes on.
        prompts: one per column.
        seed: seed of the first column; the next ones count on from it.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        resolution: height and width; by default the pipeline's own.
    """
    rows = []
    for interventions in contexts:
        generators = [torch.Generator().manual_seed(seed + column) for column in range(len(prompts))]
        latents = pipeline(
            list(prompts),
            interventions=list(interventions),
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            output_type="latent",
        ).images
        decoded = decode_latents(pipeline.vae, latents)
        rows.append(to_uint8(pipeline.image_processor.postprocess(decoded, output_type="np")))
    return rows


def draw_grid(rows: Sequence[np.ndarray], labels: Sequence[str], scale: int = 1) -> Image.Image:
    """One picture of rows of images (n, H, W, 3) uint8, each under its label; `scale` enlarges pixels.

    Labels may have the letters that [`printable`] leaves as they are.
    """
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    columns = max(map(len, rows))
    grid = Image.new("RGB", (columns * width, len(rows) * (height + _LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (images, label) in enumerate(zip(rows, labels)):
        top = index * (height + _LABEL_HEIGHT)
        text = printable(label)
        draw.text((2, top + 1), text, font=_font(text), fill="black")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (column * width, top + _LABEL_HEIGHT))
    return grid


def printable(text: str) -> str:
    """The text with escapes, such as `\\u591c`, for what no font here has: pictures would show boxes.

    Latin, Greek, Cyrillic and some more letters are there if matplotlib is installed, and else those of English.
    """
    text = unicodedata.normalize("NFC", text)
    font = _font(text)
    return "".join(char if _has(font, char) else char.encode("unicode_escape").decode() for char in text)


def _font(text: str) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font, or, where that lacks a letter, the one that comes with matplotlib."""
    own, other = _fonts()
    return own if all(_has(own, char) for char in unicodedata.normalize("NFC", text)) else other


@functools.cache
def _fonts() -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, ImageFont.ImageFont | ImageFont.FreeTypeFont]:
    own = ImageFont.load_default()
    try:
        from matplotlib import get_data_path
    except ImportError:
        return own, own
    return own, ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_SIZE)


@functools.cache
def _has(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, char: str) -> bool:
    """Whether a font draws a character as more than the box of those that it lacks."""
    if char.isascii():
        return char.isprintable()
    if not isinstance(font, ImageFont.FreeTypeFont):
        return False
    return bytes(font.getmask(char)) != bytes(font.getmask(_MISSING))
