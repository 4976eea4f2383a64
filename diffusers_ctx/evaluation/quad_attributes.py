"""quad's factors, measured on pixels.

No network and nothing of the simulator's truth: the four hues come from corners that no figure covers, the figure is
found by analysis by synthesis, with the renderer's own formulas of coverage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr

from ..data import quad
from ..data.quad import COVERAGES, HUES, MAX_EXTENT, RESOLUTION
from .images import pixel_scale


# turns after which a shape looks the same again; a circle has no orientation
PERIODS = dict(zip(quad.SHAPES, (np.nan, 1 / 4, 1 / 3, 1 / 2)))
_SIZE, _COLOR, _SHAPE, _ORIENTATION = (quad.FACTORS.index(name) for name in ("size", "color", "shape", "orientation"))

_UNREADABLE = 0.5  # residual from which on a figure's attributes are guesses
_SMALLEST, _LARGEST = 0.2 * MAX_EXTENT, MAX_EXTENT
_EDGE = 2.0  # pixels across which an edge fades: decoders blur, and a soft edge leads the refinement from further off
_SIZES = 16  # of the templates
_ARC = 3.0  # pixels that a figure's rim moves from one template to the next
_STEPS = 4  # of the refinement; further ones change nothing that matters
_CHUNK = 64  # images at once


@dataclass(frozen=True)
class QuadAttributes:
    """Attributes read off images.

    Attributes:
        values: (n, 8) in the order of `quad.FACTORS`, in the unit coordinates that drive the picture: hues and color
            as positions in [0, 1] on `quad.hue`'s path, size in [0, 1], shape as its index / 3, orientation in turns,
            modulo the shape's period. A circle's orientation is NaN, and so are all four attributes of an unreadable
            figure.
        residual: (n,) the share of the picture's squared departure from four plain quadrants that the figure found
            does not explain: 0 for a perfect figure; about 1, or more, where there is none. A figure whose residual is
            above 0.5 is called unreadable.
    """

    values: np.ndarray
    residual: np.ndarray


def read_attributes(images: np.ndarray) -> QuadAttributes:
    """Measures the eight factors of quad on images, real or generated.

    Each quadrant's color is the median over its corner that no figure reaches. A figure of coverage `a` and color `F`
    departs from the quadrants' colors `B` by `a (F - B)`. The best `F` on the hue path has a closed form. For each
    shape, the squared error is minimized over templates of all sizes and angles, then by Gauss-Newton steps; the shape
    that fits best is taken. Where figure and quadrant have the same color, that quadrant has no say.

    Its own error, on 2,000 held-out observational images (`quad.generate((), 2000, quad.FIRST_HELD_OUT_SEED)`), as
    they are and passed through the embedded autoencoder, which blurs as generated images do. The columns are mean
    absolute errors (`attribute_difference` to `true_attributes`); those of shape and unreadable are shares of images:

    | | quadrants | size | color | wrong shape | orientation | unreadable |
    |---|---:|---:|---:|---:|---:|---:|
    | rendered | 0.0002 | 0.0016 | 0.0011 | 0 | 0.0003 | 0 |
    | autoencoder | 0.0014 | 0.0043 | 0.0032 | 0.006 | 0.0029 | 0.001 |

    Small figures are read worst: of decoded figures with a size below 0.1, 1.5 % have their shape mistaken. It reads
    some 400 images a second on one core.

    Args:
        images: (n, 64, 64, 3) uint8, or float in [0, 1].

    Raises:
        ValueError: if the images have another shape or type.
    """
    if images.ndim != 4 or images.shape[1:] != (RESOLUTION, RESOLUTION, 3):
        raise ValueError(f"Got an array of shape {images.shape}; quad's images have the shape (n, 64, 64, 3).")
    if not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise ValueError(f"Got images of type {images.dtype}; give uint8, or float in [0, 1].")
    values, residual = np.empty((len(images), len(quad.FACTORS))), np.empty(len(images))
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        pixels = images[rows].astype(np.float32) / pixel_scale(images)
        values[rows], residual[rows] = _read(_quadrants(pixels))
    values[residual > _UNREADABLE, 4:] = np.nan
    return QuadAttributes(values, residual)


def true_attributes(factors: np.ndarray) -> np.ndarray:
    """The values (n, 8) that `read_attributes` should find for images of known `factors` (n, 8), see `QuadSample`."""
    values = ndtr(factors)
    values[:, _SHAPE] = np.rint(3 * values[:, _SHAPE]) / 3
    values[:, _ORIENTATION] %= _period(values)
    return values


def attribute_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute difference (..., 8) of attributes (..., 8): 0 is equal; NaN where one of the two is not readable.

    Orientations differ by the shorter way around their shape's period, at most half of it. Those of two different
    shapes cannot be compared: NaN.
    """
    difference = np.abs(a - b)
    period = np.where(difference[..., _SHAPE] < 1 / 6, _period(a), np.nan)
    turned = difference[..., _ORIENTATION] % period
    difference[..., _ORIENTATION] = np.minimum(turned, period - turned)
    return difference


def hue_position(colors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `quad.hue`: positions (...) in [0, 1] of the path's points closest to colors (..., 3) in RGB.

    The second array is the squared distance from those points.
    """
    directions = np.diff(HUES, axis=0)  # of length one: every segment changes one channel from end to end
    offset = colors[..., None, :] - HUES[:-1]
    along = np.clip((offset * directions).sum(-1), 0, 1)
    squares = ((offset - along[..., None] * directions) ** 2).sum(-1)
    segment = squares.argmin(-1)[..., None]
    position = (segment + np.take_along_axis(along, segment, -1)) / len(directions)
    return position[..., 0], np.take_along_axis(squares, segment, -1)[..., 0]


def _period(values: np.ndarray) -> np.ndarray:
    """Period (...) of the shapes in attributes (..., 8); NaN for circles and for unreadable shapes."""
    shape = values[..., _SHAPE]
    index = np.rint(3 * np.nan_to_num(shape)).astype(int)  # an unreadable shape counts as a circle, which has none
    return np.array(list(PERIODS.values()))[index]


def _quadrants(images: np.ndarray) -> np.ndarray:
    """(n, 64, 64, ...) as (n, 4, 1024, ...), in the order of quad1 to quad4."""
    half = RESOLUTION // 2
    left, right = slice(None, half), slice(half, None)
    parts = [
        images[:, rows, columns] for rows, columns in ((right, left), (right, right), (left, left), (left, right))
    ]
    return np.stack([part.reshape(len(images), half * half, *images.shape[3:]) for part in parts], axis=1)


_AXIS = np.arange(RESOLUTION, dtype=np.float32) + 0.5 - RESOLUTION // 2
_X, _Y = (_quadrants(coordinate[None]) for coordinate in np.meshgrid(_AXIS, _AXIS))
# the furthest that a figure reaches is a corner of the largest square
_CORNERS = np.hypot(_X, _Y)[0] > _LARGEST / np.sqrt(2) + 0.5


def _coverage(shape: int, extent: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Coverage (n, 4, 1024) by figures of one shape, with edges `_EDGE` pixels wide."""
    extent, angle = (array.astype(np.float32)[:, None, None] for array in (extent, 2 * np.pi * turns))
    cosine, sine = np.cos(angle), np.sin(angle)
    sharp = COVERAGES[shape](cosine * _X + sine * _Y, cosine * _Y - sine * _X, extent)
    return np.clip(0.5 + (sharp - 0.5) / _EDGE, 0, 1)


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Shapes, extents and turns (K,) of the figures that a search starts from, and their coverage (K, 4, 1024)."""
    figures = []
    for shape, period in enumerate(PERIODS.values()):
        for extent in np.geomspace(_SMALLEST, _LARGEST, _SIZES):
            rim = np.nan_to_num(period * np.pi * extent)  # pixels that half an extent sweeps within a period
            count = int(np.clip(np.ceil(rim / _ARC), 4, None)) if rim else 1
            figures += [(shape, extent, np.nan_to_num(period) * step / count) for step in range(count)]
    shapes, extents, turns = np.array(figures).T
    shapes = shapes.astype(int)
    coverage = [_coverage(s, extents[shapes == s], turns[shapes == s]) for s in range(len(PERIODS))]
    return shapes, extents, turns, np.concatenate(coverage)


def _read(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, 8) and residual (n,) of pixels (n, 4, 1024, 3)."""
    background = np.stack([np.median(pixels[:, q, corner], axis=1) for q, corner in enumerate(_CORNERS)], axis=1)
    departure = pixels - background[:, :, None]
    fits = []
    for shape, (extent, turns) in enumerate(_closest_templates(departure, background)):
        extent, turns, color, misfit = _refine(shape, extent, turns, departure, background)
        size = np.clip((extent / MAX_EXTENT - 0.2) / 0.8, 0, 1)
        period = list(PERIODS.values())[shape]
        fits.append((size, color, np.full_like(size, shape / 3), turns % period, misfit))
    candidates = np.array(fits)  # (shapes, 5, n)
    *figure, misfit = candidates[candidates[:, -1].argmin(0), :, np.arange(len(pixels))].T
    total = (departure**2).sum((1, 2, 3))
    residual = np.divide(misfit, total, out=np.ones_like(misfit), where=total > 0)
    return np.column_stack([hue_position(background)[0], *figure]), residual


def _closest_templates(departure: np.ndarray, background: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each shape, extent and turns (n,) of the template that explains an image best, in the best color for it."""
    shapes, extents, turns, coverage = _templates()
    squares = (coverage**2).sum(2)  # (K, 4)
    flat = coverage.reshape(len(coverage), -1).T
    # |D - a (F - B)|^2 summed over pixels, in powers of F: |D + a B|^2 - 2 F . moment + |F|^2 mass
    constant = 2 * (departure @ background[..., None]).reshape(len(departure), -1) @ flat
    constant += (background**2).sum(-1) @ squares.T
    channels = [
        departure[..., c].reshape(len(departure), -1) @ flat + background[..., c] @ squares.T for c in range(3)
    ]
    moment, mass = np.stack(channels, axis=-1), squares.sum(1)
    free = moment / mass[:, None]  # the best color of all; the best on the path is the closest to it
    _, off_path = hue_position(free)
    misfit = constant - (moment * free).sum(-1) + mass * off_path
    members = [np.flatnonzero(shapes == shape) for shape in range(len(PERIODS))]
    best = [rows[misfit[:, rows].argmin(1)] for rows in members]
    return [(extents[index], turns[index]) for index in best]


def _fit_color(
    coverage: np.ndarray, departure: np.ndarray, background: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best hue position (n,) of figures, their contrast (n, 4, 1, 3) to the quadrants, and what they leave."""
    squares = (coverage**2).sum(2)[..., None]
    moment = (coverage[:, :, None] @ departure)[:, :, 0] + squares * background
    position, _ = hue_position(moment.sum(1) / squares.sum(1))
    contrast = (quad.hue(position)[:, None] - background)[:, :, None]
    return position, contrast, departure - coverage[..., None] * contrast


def _refine(
    shape: int, extent: np.ndarray, turns: np.ndarray, departure: np.ndarray, background: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Damped Gauss-Newton steps; gives extent, turns, hue position and the sum of squares left, each (n,)."""
    delta = 0.25  # pixels
    for _ in range(_STEPS):
        arc = 1 / (np.pi * extent)  # turns that move the rim by one pixel, so that both unknowns are in pixels
        coverage = _coverage(shape, extent, turns)
        _, contrast, rest = _fit_color(coverage, departure, background)
        moved = (_coverage(shape, extent + delta, turns), _coverage(shape, extent, turns + delta * arc))
        slopes = (np.stack(moved, axis=-1) - coverage[..., None]) / delta  # (n, 4, 1024, 2)
        weighted = (slopes * (contrast**2).sum(-1, keepdims=True)).reshape(len(slopes), -1, 2)
        error = (rest @ contrast.transpose(0, 1, 3, 2)).reshape(len(slopes), 1, -1)
        slopes = slopes.reshape(len(slopes), -1, 2)
        hessian = slopes.transpose(0, 2, 1) @ weighted
        damping = 1e-3 + 0.02 * np.trace(hessian, axis1=1, axis2=2)
        step = np.linalg.solve(hessian + damping[:, None, None] * np.eye(2), (error @ slopes).transpose(0, 2, 1))
        step = np.clip(step[..., 0], -2, 2)
        extent = np.clip(extent + step[:, 0], _SMALLEST, _LARGEST)
        turns = turns + step[:, 1] * arc
    color, _, rest = _fit_color(_coverage(shape, extent, turns), departure, background)
    return extent, turns, color, (rest**2).sum((1, 2, 3))
