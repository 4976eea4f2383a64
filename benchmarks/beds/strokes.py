"""Operations on drawings of a single digit, and measurements of them.

A drawing is a digit at `FINE` times the resolution of its picture, an array (H, W) in [0, 1] whose ink is bright. All
lengths are in pixels of the picture. The operations are those of Morpho-MNIST (Castro et al., JMLR 2019) and affine
maps, on grey values.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage


FINE = 4
MEASUREMENTS = ("thickness", "slant", "size", "x", "y", "bulge")


def enlarge(picture: np.ndarray) -> np.ndarray:
    """The drawing (4H, 4W) of a grey picture (H, W) uint8."""
    height, width = picture.shape
    grey = Image.fromarray(picture.astype(np.float32) / 255)
    return np.clip(np.asarray(grey.resize((FINE * width, FINE * height), Image.Resampling.BICUBIC)), 0.0, 1.0)


def reduce(drawing: np.ndarray) -> np.ndarray:
    """The grey picture (H, W) uint8 of a drawing (4H, 4W): means of squares."""
    height, width = drawing.shape
    squares = drawing.reshape(height // FINE, FINE, width // FINE, FINE)
    return np.round(255 * squares.mean((1, 3))).astype(np.uint8)


def thicken(drawing: np.ndarray, share: float) -> np.ndarray:
    """A dilation by a disc, which makes strokes thicker by this share of their mean thickness."""
    return ndimage.grey_dilation(drawing, footprint=_disc(FINE * share * thickness(drawing) / 2))


def thin(drawing: np.ndarray, share: float) -> np.ndarray:
    """An erosion by a disc, which makes strokes thinner by this share of their mean thickness."""
    return ndimage.grey_erosion(drawing, footprint=_disc(FINE * share * thickness(drawing) / 2))


def grow(drawing: np.ndarray, width: float) -> np.ndarray:
    """The filled outline of the ink, after strokes have grown by a width in pixels, or shrunk by a negative one.

    The middle of a stroke stays where the outline moves past it.
    """
    ridge, depth = _ridge(drawing)
    height = depth - ndimage.distance_transform_edt(depth == 0) / FINE  # over the shore of the ink
    grown = height + width / 2
    return np.clip(0.5 + FINE * np.where(ridge, np.maximum(grown, 0.5 / FINE), grown), 0.0, 1.0)


def change_thickness(drawing: np.ndarray, change: float) -> np.ndarray:
    """Grows strokes until their measured thickness has changed by a number of pixels.

    Where strokes meet or holes close the measured change is smaller than the growth: 0.7 of it on real digits.
    """
    wanted, width = thickness(drawing) + change, change
    for _ in range(2):
        width += wanted - thickness(grow(drawing, width))
    return grow(drawing, width)


def swell(drawing: np.ndarray, strength: float, where: float, radius: float = 7.0) -> np.ndarray:
    """A bulge about a point of a stroke: points at a distance r < radius move to radius * (r / radius)^(1 / strength).

    Args:
        drawing: the drawing.
        strength: above 1.
        where: in [0, 1), which of the points on the middle of strokes, counted from the top.
        radius: of the bulge, in pixels of the picture.
    """
    ridge = np.argwhere(_ridge(drawing)[0])
    if not len(ridge):
        return drawing
    centre = ridge[int(where * len(ridge))][:, None, None]
    offset = np.indices(drawing.shape) - centre
    distance = np.hypot(*offset) / (FINE * radius)
    pull = np.where(distance < 1, np.maximum(distance, 1e-6) ** (strength - 1), 1.0)
    return ndimage.map_coordinates(drawing, centre + offset * pull, order=1)


def transform(
    drawing: np.ndarray, scale: float = 1.0, shear: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """An affine map about the ink's centre of mass.

    Args:
        drawing: the drawing.
        scale: factor of width and height.
        shear: how far a point moves to the right for each pixel that it is above the centre.
        shift: to the right and down, in pixels.
    """
    centre = np.array(ndimage.center_of_mass(drawing)) if drawing.any() else np.zeros(2)
    forward = scale * np.array([[1.0, 0.0], [-shear, 1.0]])  # of (row, column)
    backward = np.linalg.inv(forward)
    moved = centre + FINE * np.array(shift[::-1])
    return ndimage.affine_transform(drawing, backward, centre - backward @ moved, order=1)


def measure(drawing: np.ndarray) -> np.ndarray:
    """`MEASUREMENTS` of a drawing; NaN if it has no ink.

    Ink is what is brighter than half the brightest. *Thickness* is twice the mean distance of the middle of strokes to
    their edge; *slant* the shear that would make columns and rows of ink uncorrelated, positive to the right; *size*
    the fourth root of the determinant of their covariance, which no shear and no shift changes; *x* and *y* the
    centre of mass, right and down of the picture's middle; *bulge* the diameter of the largest disc of ink over the
    thickness.
    """
    ridge, depth = _ridge(drawing)
    if not ridge.any():
        return np.full(len(MEASUREMENTS), np.nan)
    rows, columns = (np.argwhere(depth > 0).T + 0.5) / FINE
    (row_variance, covariance), (_, column_variance) = np.cov(rows, columns, bias=True)
    width = 2 * depth[ridge].mean()
    return np.array(
        [
            width,
            -covariance / max(row_variance, 1e-6),
            max(row_variance * column_variance - covariance**2, 0.0) ** 0.25,
            columns.mean() - drawing.shape[1] / FINE / 2,
            rows.mean() - drawing.shape[0] / FINE / 2,
            2 * depth.max() / width,
        ]
    )


def thickness(drawing: np.ndarray) -> float:
    """The first of the measurements alone; 0 if there is no ink."""
    ridge, depth = _ridge(drawing)
    return float(2 * depth[ridge].mean()) if ridge.any() else 0.0


def _ridge(drawing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which points are on the middle of strokes, and how far every point of ink is from paper, in pixels."""
    ink = drawing > max(drawing.max() / 2, 0.05)  # a picture that is all but black has none
    depth = ndimage.distance_transform_edt(ink) / FINE
    return ink & (depth == ndimage.maximum_filter(depth, 3)), depth


def _disc(radius: float) -> np.ndarray:
    reach = np.arange(-int(radius), int(radius) + 1)
    return np.hypot(*np.meshgrid(reach, reach)) <= radius
