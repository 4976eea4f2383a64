"""The one way in which pictures become squares: for training, for the pipelines and for the evaluation."""

from __future__ import annotations

from PIL import Image, ImageOps


def square_crop(image: Image.Image, resolution: int, centering: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """Resizes an image's shorter side to `resolution` and crops a square, in RGB.

    Args:
        image: an image of any size and mode.
        resolution: height and width of the square, in pixels.
        centering: place of the crop from left to right and from top to bottom, in [0, 1]; by default the centre.
    """
    return ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS, centering=centering)
