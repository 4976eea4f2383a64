"""Images as they are encoded in their files, and why some cannot be decoded."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset, Image

from .contexts import listed
from .decoding import conversions, to_rgb, warn_of_conversions


with suppress(ImportError):  # a package that people install where they have HEIC files
    from pillow_heif import register_heif_opener

    register_heif_opener()


_PNG = b"\x89PNG\r\n\x1a\n"
_UNNEEDED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_VIDEO = (b"qt  ", b"isom", b"iso2", b"mp41", b"mp42", b"M4V ", b"3gp4", b"3gp5")


class RGBImage(Image):
    """A column of encoded images of any kind, which are decoded to RGB; see `to_rgb`."""

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> PIL.Image.Image:
        """The image in RGB."""
        return read_image(value)[0] if isinstance(value, dict) else to_rgb(value)


def read_image(image: dict[str, Any] | None) -> tuple[PIL.Image.Image, list[str]]:
    """An encoded image in RGB, and what was converted of it; see `conversions`.

    Raises:
        ValueError: if it cannot be decoded, saying why.
    """
    if image is None or image["bytes"] is image["path"] is None:
        raise ValueError("no image")
    content = b""
    try:
        if image["bytes"] is None and "://" in image["path"]:  # in an archive or on the Hub
            return _converted(Image().decode_example(image))
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        return _decoded(content)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(_cause(content, error)) from error


def readable_rows(dataset: Dataset, rows: list[int], skip_unreadable: bool) -> list[int]:
    """Decodes the images of these rows; says in one line what is converted.

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
        checked = list(pool.map(lambda row: _check(encoded[row]["image"]), rows))
    broken = {row: defect for row, (defect, _) in zip(rows, checked) if defect}
    if broken and not skip_unreadable:
        raise ValueError(
            f"{_unreadable(encoded, broken, len(rows))}. Repair or remove them, or pass `skip_unreadable=True`"
            " (`--skip_unreadable`) to leave them out."
        )
    readable = [row for row in rows if row not in broken]
    if broken:
        message = _unreadable(encoded, broken, len(rows))
        contexts = list(dataset["context"])
        emptied = sorted({contexts[row] for row in broken} - {contexts[row] for row in readable})
        if emptied:
            raise ValueError(f"{message}. No image is left in the contexts {emptied}; add readable ones.")
        warnings.warn(f"{message}. They are left out.", stacklevel=3)
    warn_of_conversions((kind for _, found in checked for kind in found), stacklevel=3)
    return readable


def _check(image: dict[str, Any] | None) -> tuple[str | None, list[str]]:
    """Why an encoded image cannot be decoded, `None` if it can; and what is converted of it."""
    try:
        return None, read_image(image)[1]
    except ValueError as error:
        return str(error), []


def _unreadable(encoded: Dataset, broken: dict[int, str], total: int) -> str:
    names = [f"{_name(encoded[row], row)} ({defect})" for row, defect in broken.items()]
    return f"{len(broken)} of {total} images cannot be read: {listed(names)}"


def _name(example: dict[str, Any], row: int) -> str:
    return (example["image"] or {}).get("path") or f"row {row}, context {example['context']!r}"


def _decoded(content: bytes) -> tuple[PIL.Image.Image, list[str]]:
    try:
        return _converted(PIL.Image.open(BytesIO(content)))
    except ValueError:
        if not content.startswith(_PNG):
            raise
        # Pillow refuses long texts, such as the workflows that image generators write into their files
        return _converted(PIL.Image.open(BytesIO(_without_texts(content))))


def _converted(picture: PIL.Image.Image) -> tuple[PIL.Image.Image, list[str]]:
    found = conversions(picture)
    picture.load()
    return to_rgb(picture), found


def _without_texts(png: bytes) -> bytes:
    """The file without texts and color profile, which are not used."""
    kept, start = [_PNG], len(_PNG)
    while start + 8 <= len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in _UNNEEDED_CHUNKS:
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _cause(content: bytes, error: Exception) -> str:
    """Why an image cannot be decoded, and what mends it where that is known."""
    if isinstance(error, PIL.Image.DecompressionBombError):
        return "more pixels than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS` allows; scale it down or raise the limit"
    if not isinstance(error, PIL.UnidentifiedImageError):
        return str(error) or type(error).__name__
    start, brand = content[:512].lstrip().lower(), content[8:12] if content[4:8] == b"ftyp" else b""
    if not content.strip(b"\0"):
        return "the file is empty" if not content else "the file holds zeros alone"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file with `git lfs pull`"
    if brand in _HEIC:
        return "HEIC under another name; convert it to JPEG, or `pip install pillow-heif`"
    if brand in _VIDEO:
        return "a video under another name"
    if b"<svg" in start:
        return "SVG; convert it to PNG"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page under another name; download the image itself"
    if start.startswith((b"ii*\0", b"mm\0*")):
        return "a kind of TIFF that Pillow cannot read; save it with 8 bits per channel"
    return "cannot identify image file"
