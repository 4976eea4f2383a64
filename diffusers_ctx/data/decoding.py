"""Decoding and cropping of images, and images that cannot be decoded."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL.Image
import PIL.ImageOps
from datasets import Dataset, Image

from .contexts import listed


def decode_image(image: dict[str, Any] | None) -> PIL.Image.Image:
    """An encoded image in RGB.

    Raises:
        ValueError: if it cannot be decoded, saying why.
    """
    if image is None:
        raise ValueError("no image")
    try:
        return Image(mode="RGB").decode_example(image)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(str(error) or type(error).__name__) from error


def square_crop(
    image: PIL.Image.Image, resolution: int, centering: tuple[float, float] = (0.5, 0.5)
) -> PIL.Image.Image:
    """Resizes an image's shorter side to `resolution` and crops a square, in RGB.

    Args:
        image: an image of any size and mode.
        resolution: height and width of the square, in pixels.
        centering: place of the crop from left to right and from top to bottom, in [0, 1]; by default the center.
    """
    size, method = (resolution, resolution), PIL.Image.Resampling.LANCZOS
    return PIL.ImageOps.fit(image.convert("RGB"), size, method, centering=centering)


def readable_rows(dataset: Dataset, rows: list[int], skip_unreadable: bool) -> list[int]:
    """Decodes the images of these rows.

    Args:
        dataset: has the columns `image` and `context`.
        rows: the rows to decode.
        skip_unreadable: whether images that cannot be decoded are left out, with one warning.

    Returns:
        The rows whose images can be decoded.

    Raises:
        ValueError: naming the images that cannot, unless they are skipped, or if a context has no others.
    """
    encoded = dataset.cast_column("image", Image(decode=False))
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        defects = dict(zip(rows, pool.map(lambda row: _defect(encoded[row]["image"]), rows)))
    broken = {row: defect for row, defect in defects.items() if defect}
    if not broken:
        return rows
    message = f"{len(broken)} of {len(rows)} images cannot be read: " + listed(
        [f"{_name(encoded[row], row)} ({defect})" for row, defect in broken.items()]
    )
    if not skip_unreadable:
        raise ValueError(
            f"{message}. Repair or remove them, or pass `skip_unreadable=True` (`--skip_unreadable`) to leave them"
            " out."
        )
    readable = [row for row in rows if row not in broken]
    contexts = list(dataset["context"])
    emptied = sorted({contexts[row] for row in broken} - {contexts[row] for row in readable})
    if emptied:
        raise ValueError(f"{message}. No image is left in the contexts {emptied}; add readable ones.")
    warnings.warn(f"{message}. They are left out.", stacklevel=3)
    return readable


def _defect(image: dict[str, Any] | None) -> str | None:
    """Why an encoded image cannot be decoded; `None` if it can."""
    try:
        decode_image(image)
    except ValueError as error:
        return str(error)
    return None


def _name(example: dict[str, Any], row: int) -> str:
    return (example["image"] or {}).get("path") or f"row {row}, context {example['context']!r}"
