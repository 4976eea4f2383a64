"""Letters that the fonts of pictures have, and escapes for others."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path

from PIL import ImageFont


_FONT_SIZE = 10
_MISSING = "\U0010ffff"  # no character, so no font has it

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def printable(text: str) -> str:
    """The text with escapes, such as `\\u591c`, for what no font here has: pictures would show boxes.

    Latin, Greek, Cyrillic and some more letters are there if matplotlib is installed, and else those of English.
    """
    text = unicodedata.normalize("NFC", text)
    font = font_for(text)
    return "".join(char if _has(font, char) else char.encode("unicode_escape").decode() for char in text)


def font_for(text: str) -> Font:
    """Pillow's own font, or, where that lacks a letter, the one that comes with matplotlib."""
    own, other = _fonts()
    return own if all(_has(own, char) for char in unicodedata.normalize("NFC", text)) else other


@functools.cache
def _fonts() -> tuple[Font, Font]:
    own = ImageFont.load_default()
    try:
        from matplotlib import get_data_path
    except ImportError:
        return own, own
    return own, ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_SIZE)


@functools.cache
def _has(font: Font, char: str) -> bool:
    """Whether a font draws a character as more than the box of those that it lacks."""
    if char.isascii():
        return char.isprintable()
    if not isinstance(font, ImageFont.FreeTypeFont):
        return False
    return bytes(font.getmask(char)) != bytes(font.getmask(_MISSING))
