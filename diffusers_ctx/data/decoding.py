"""Pictures of any kind as RGB with 8 bits, and their crop."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps


_ORIENTATION = 0x0112  # tags of EXIF and TIFF
_BITS_PER_SAMPLE = 258
_SAMPLE_FORMAT = 339
_UNSIGNED = 1

_INTEGER_BITS = (8, 16, 31, 32)
_FLOAT_RANGES = (1.0, 255.0, 65535.0)
_TOLERANCE = 0.01  # resampling overshoots the range of floats a little

_ANIMATED = {"GIF", "PNG", "WEBP", "AVIF", "TIFF"}  # a second frame of others is a preview or a layer
_SIXTEEN_BITS = {"PNG", "PPM"}  # also where Pillow holds them in 32
_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}

TRANSPARENT = "with transparent parts (laid over white)"
DEEP = "of 32 bits or floats (in the smallest usual range that holds their values)"
ANIMATED = "with several frames (the first is taken)"


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A picture of any mode in RGB, upright as its EXIF data say.

    Grey values of 16 bits lose their lower byte. Values of 32 bits and floats are read in the smallest usual range
    that holds them: 8, 16, 31 or 32 bits, and [0, 1], [0, 255] or [0, 65535]. Transparent parts are laid over white,
    as viewers show them.

    Raises:
        ValueError: if the values of a picture fit no range.
    """
    image = _upright(image)
    if image.mode == "LAB":
        return _from_lab(image)
    if _is_deep(image):
        image = _grey(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    ground = PIL.Image.new("RGBA", image.size, "white")
    ground.alpha_composite(_with_alpha(image))
    return ground.convert("RGB")


def conversions(image: PIL.Image.Image) -> list[str]:
    """What `to_rgb` changes of a picture beyond its mode, for [`warn_of_conversions`]."""
    found = []
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        found.append(ANIMATED)
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        found.append(DEEP)
    if image.has_transparency_data and not _is_opaque(image):
        found.append(TRANSPARENT)
    return found


def warn_of_conversions(found: Iterable[str], stacklevel: int = 2) -> None:
    """Says in one line how many pictures were converted, by what `conversions` found; nothing if none were."""
    counts = Counter(found)
    if counts:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        warnings.warn(f"Images are converted to RGB: {kinds}.", stacklevel=stacklevel + 1)


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
    return PIL.ImageOps.fit(to_rgb(image), size, method, centering=centering)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return PIL.ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged EXIF data raise many types, and the picture is fine
        return image


def _is_deep(image: PIL.Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _grey(image: PIL.Image.Image) -> PIL.Image.Image:
    """A grey picture of more than 8 bits with 8, and with its alpha channel if one value of it is transparent."""
    values = np.asarray(image)
    grey = _float_levels(values) if image.mode == "F" else _integer_levels(image, values)
    picture = PIL.Image.fromarray(grey.astype(np.uint8))
    if "transparency" in image.info:
        picture.putalpha(PIL.Image.fromarray((values != image.info["transparency"]).astype(np.uint8) * 255))
    return picture


def _integer_levels(image: PIL.Image.Image, values: np.ndarray) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    if image.mode != "I":
        return values >> (tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8)
    if image.format in _SIXTEEN_BITS:
        return values.clip(0, 2**16 - 1) >> 8
    if values.min() < 0 and tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        values = values.view(np.uint32)
    if values.min() < 0:
        raise ValueError(_no_range(values))
    bits = next(bits for bits in _INTEGER_BITS if int(values.max()) < 2**bits)
    return values >> (bits - 8)


def _float_levels(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    top = next((top for top in _FLOAT_RANGES if high <= (1 + _TOLERANCE) * top), None)
    if top is None or low < -_TOLERANCE * top:
        raise ValueError(_no_range(values))
    return np.rint((values / top).clip(0, 1) * 255)


def _no_range(values: np.ndarray) -> str:
    return f"its values from {values.min():g} to {values.max():g} are in no usual range; save it with 8 or 16 bits"


def _from_lab(image: PIL.Image.Image) -> PIL.Image.Image:
    lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
    converted = PIL.ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None  # it is only where it changes the picture in place
    return converted


def _with_alpha(image: PIL.Image.Image) -> PIL.Image.Image:
    return image.convert(_STRAIGHT_ALPHA.get(image.mode, image.mode)).convert("RGBA")


def _is_opaque(image: PIL.Image.Image) -> bool:
    if _is_deep(image):
        return not bool((np.asarray(image) == image.info["transparency"]).any())
    return _with_alpha(image).getchannel("A").getextrema()[0] == 255
