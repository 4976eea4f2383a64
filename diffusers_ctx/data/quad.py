"""quad: a generated benchmark whose ground truth is known.

Eight factors follow a linear-Gaussian structural causal model. Each is drawn into a 64x64 picture: the hue of four
quadrants, and the size, color, shape and orientation of a figure in the center. Since the model is known, so are the
distribution under any intervention, also of several at once, and the true counterfactual of any image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from ..paths import local_path


FACTORS = ("quad1", "quad2", "quad3", "quad4", "size", "color", "shape", "orientation")
CONCEPTS = ("quad1", "quad2", "quad3", "quad4", "size", "orientation")
HELD_OUT_PAIRS = (
    ("quad1", "quad2"),
    ("quad1", "quad3"),
    ("quad1", "quad4"),
    ("quad1", "size"),
    ("quad1", "orientation"),
    ("quad2", "quad3"),
    ("quad2", "quad4"),
    ("quad2", "size"),
    ("quad2", "orientation"),
)
HELD_OUT_TRIPLES = (
    ("quad1", "quad2", "quad4"),
    ("quad1", "quad3", "orientation"),
    ("quad2", "size", "orientation"),
)
SHAPES = ("circle", "square", "triangle", "ellipse")

# (cause, effect): weight
EDGES = {
    ("quad2", "quad1"): -1.23,
    ("quad3", "quad2"): 1.56,
    ("quad4", "quad1"): 1.34,
    ("quad4", "quad3"): -0.72,
    ("color", "quad1"): -0.95,
    ("color", "size"): 1.67,
    ("shape", "quad2"): 0.58,
    ("shape", "color"): -1.34,
    ("orientation", "quad1"): 1.12,
    ("orientation", "size"): -0.81,
    ("orientation", "shape"): 1.45,
}
NOISE_VARIANCES = dict(zip(FACTORS, (1.386, 1.164, 1.005, 1.956, 1.275, 1.42, 1.31, 1.18)))
# factor: (mean, variance) of the mechanism that an intervention puts instead of the observational one
INTERVENTIONS = {
    "quad1": (1.169, 1.949),
    "quad2": (1.475, 1.359),
    "quad3": (-1.606, 1.573),
    "quad4": (-1.966, 1.102),
    "size": (1.012, 1.305),
    "color": (-0.85, 1.52),
    "shape": (1.23, 1.41),
    "orientation": (-0.67, 1.26),
}

RESOLUTION = 64
# Seeds from here on are for evaluation: nothing that the library ships was trained on an image drawn from one.
FIRST_HELD_OUT_SEED = 1_000_000
MAX_EXTENT = 48.0
HUES = np.array(
    [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1]], dtype=np.float32
)  # red, yellow, green, cyan, blue, magenta
_CHUNK = 64  # images rendered at once; small enough to stay in the processor's cache


def edge_matrix(dependent: bool = True) -> np.ndarray:
    """The weights `W` of `x = W x + noise` before standardization: (8, 8), row = effect, column = cause."""
    weights = np.zeros((len(FACTORS), len(FACTORS)))
    if dependent:
        for (cause, effect), weight in EDGES.items():
            weights[FACTORS.index(effect), FACTORS.index(cause)] = weight
    return weights


def observational_deviation(dependent: bool = True) -> np.ndarray:
    """Standard deviation (8,) of each raw factor in the observational context; the means are zero."""
    total_effects = np.linalg.inv(np.eye(len(FACTORS)) - edge_matrix(dependent))
    return np.sqrt((total_effects**2) @ np.array([NOISE_VARIANCES[name] for name in FACTORS]))


def descendants(factor: str) -> set[str]:
    """Every factor that `factor` causes, directly or through others, in the dependent variant."""
    children = {effect for cause, effect in EDGES if cause == factor}
    return children.union(*(descendants(child) for child in children))


@dataclass(frozen=True)
class QuadSample:
    """Images of one context together with what only a simulator knows.

    Attributes:
        images: (n, 64, 64, 3) uint8.
        factors: (n, 8) float64, in the order of `FACTORS`, standardized with the observational mean and deviation.
        captions: n strings that name the shape.
        noise: (n, 8) float64, the exogenous noise, standard normal.
        interventions: the factors that were intervened on.
        dependent: whether the factors cause one another.
    """

    images: np.ndarray
    factors: np.ndarray
    captions: list[str]
    noise: np.ndarray
    interventions: tuple[str, ...]
    dependent: bool

    def __len__(self) -> int:
        return len(self.images)

    def counterfactual(self, interventions: Iterable[str]) -> QuadSample:
        """What the same images would have been under other interventions: their exogenous noise, other mechanisms."""
        return _sample(self.noise, tuple(interventions), self.dependent)


def generate(interventions: Sequence[str] = (), n: int = 1, seed: int = 0, dependent: bool = True) -> QuadSample:
    """Draws `n` images of one context.

    Args:
        interventions: names of the factors to intervene on; none is the observational context.
        n: number of images.
        seed: seed of the exogenous noise. The same seed gives the same noise under every intervention, so two samples
            that differ in `interventions` alone are each other's counterfactuals.
        dependent: the variant; `False` drops all edges between the factors.

    Raises:
        ValueError: if an intervention names no factor, or `n` is negative.
    """
    if isinstance(interventions, str):
        raise ValueError(f"`interventions` is a list of factors; write [{interventions!r}].")
    if n < 0:
        raise ValueError(f"`n` is {n}; it must not be negative.")
    noise = np.random.default_rng(seed).standard_normal((n, len(FACTORS)))
    return _sample(noise, tuple(interventions), dependent)


def contexts(concepts: Iterable[str] = CONCEPTS) -> dict[str, tuple[str, ...]]:
    """Context names and what each intervenes on: `obs`, then one context per concept."""
    return {"obs": ()} | {name: (name,) for name in concepts}


def write_folders(root: str | Path, n: int, seed: int = 0, dependent: bool = True) -> Path:
    """Writes `root/<context>/*.png` with a `metadata.csv` of captions each: the input a user of one's own data has.

    Args:
        root: folder to write to.
        n: images per context.
        seed: the first context's seed; each context has its own, so that no noise is shared between contexts.
        dependent: the variant, see `generate`.
    """
    from PIL import Image

    root = local_path(root)
    for offset, (context, interventions) in enumerate(contexts().items()):
        folder = root / context
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("[0-9]*.png"):  # of a larger set, they would be images without a caption
            earlier.unlink()
        sample = generate(interventions, n=n, seed=seed + offset, dependent=dependent)
        lines = ["file_name,text"]
        for index, (image, caption) in enumerate(zip(sample.images, sample.captions)):
            name = f"{index:05d}.png"
            Image.fromarray(image).save(folder / name, compress_level=1)
            lines.append(f"{name},{caption}")
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def _sample(noise: np.ndarray, interventions: tuple[str, ...], dependent: bool) -> QuadSample:
    factors = _solve(noise, interventions, dependent) / observational_deviation(dependent)
    images, captions = render(factors)
    return QuadSample(images, factors, captions, noise, interventions, dependent)


def _solve(noise: np.ndarray, interventions: tuple[str, ...], dependent: bool) -> np.ndarray:
    """Raw factors (n, 8): an intervened mechanism has no causes and its own mean and variance."""
    unknown = [name for name in interventions if name not in FACTORS]
    if unknown:
        raise ValueError(f"Unknown factors {unknown}; quad has {list(FACTORS)}.")
    mean = np.zeros(len(FACTORS))
    variance = np.array([NOISE_VARIANCES[name] for name in FACTORS])
    weights = edge_matrix(dependent)
    for name in interventions:
        index = FACTORS.index(name)
        mean[index], variance[index] = INTERVENTIONS[name]
        weights[index] = 0
    return np.linalg.solve(np.eye(len(FACTORS)) - weights, (mean + np.sqrt(variance) * noise).T).T


def hue(unit: np.ndarray) -> np.ndarray:
    """RGB in [0, 1], shape (..., 3), of positions in [0, 1] on the way from red over green and blue to magenta."""
    position = np.clip(unit, 0, 1) * (len(HUES) - 1)
    lower = np.minimum(position.astype(int), len(HUES) - 2)
    fraction = (position - lower)[..., None].astype(np.float32)
    return HUES[lower] * (1 - fraction) + HUES[lower + 1] * fraction


def render(factors: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Images (n, 64, 64, 3) uint8 and captions of given factors (n, 8), see `QuadSample`.

    Other simulators than `generate` draw with it: a factor fills its range evenly if it is standard normal.
    """
    unit = ndtr(factors)
    shapes = np.rint(3 * unit[:, FACTORS.index("shape")]).astype(int)
    return _render(unit.astype(np.float32), shapes), [_CAPTIONS[index] for index in shapes]


def _render(unit: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Images (n, 64, 64, 3) from factors in [0, 1] (n, 8) and the index of each shape (n,)."""
    images = np.empty((len(unit), RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
    for shape, coverage in enumerate(COVERAGES):  # one shape at a time: its formula is then one array expression
        members = np.flatnonzero(shapes == shape)
        for start in range(0, len(members), _CHUNK):
            rows = members[start : start + _CHUNK]
            images[rows] = _render_chunk(unit[rows], coverage)
    return images


def _render_chunk(unit: np.ndarray, coverage) -> np.ndarray:
    colors = np.rint(hue(unit[:, :4]) * 255).astype(np.int16)
    quad1, quad2, quad3, quad4 = colors.transpose(1, 0, 2)[:, :, None, None]
    half = RESOLUTION // 2
    images = np.empty((len(unit), RESOLUTION, RESOLUTION, 3), dtype=np.int16)
    images[:, half:, :half] = quad1
    images[:, half:, half:] = quad2
    images[:, :half, :half] = quad3
    images[:, :half, half:] = quad4

    extent = (MAX_EXTENT * (0.2 + 0.8 * unit[:, 4]))[:, None, None]
    angle = (2 * np.pi * unit[:, 7])[:, None, None]
    cosine, sine = np.cos(angle), np.sin(angle)
    axis = np.arange(RESOLUTION, dtype=np.float32) + 0.5 - half
    x, y = axis[None, None, :], axis[None, :, None]
    alpha = coverage(cosine * x + sine * y, cosine * y - sine * x, extent)
    # 8-bit fixed point: blending in floats would take most of the time
    weight = np.rint(np.clip(alpha, 0, 1) * 128).astype(np.int16)[..., None]
    figure = np.rint(hue(unit[:, 5]) * 255).astype(np.int16)[:, None, None, :]
    return (images + (((figure - images) * weight + 64) >> 7)).astype(np.uint8)


# Coverage of a pixel by a figure of some extent, at coordinates (x, y) turned with it and y pointing down: one half
# minus the signed distance to its edge, so that edges are smooth and sizes and angles are visible below a pixel.


def _circle(x, y, extent):
    return 0.5 + extent / 2 - np.sqrt(x * x + y * y)


def _square(x, y, extent):
    return 0.5 + extent / 2 - np.maximum(np.abs(x), np.abs(y))


def _triangle(x, y, extent):
    # equilateral, one corner up at angle 0; the distance from the centre to a side is half the circumradius
    slope = np.float32(np.sqrt(3) / 2)
    return 0.5 + extent / 4 - np.maximum(y, slope * np.abs(x) - y / 2)


def _ellipse(x, y, extent):
    long, short = extent / 2, extent / 4
    radius = np.sqrt((x / long) ** 2 + (y / short) ** 2)
    gradient = np.sqrt((x / long**2) ** 2 + (y / short**2) ** 2)
    return 0.5 - radius * (radius - 1) / np.maximum(gradient, 1e-6)


COVERAGES = (_circle, _square, _triangle, _ellipse)
_CAPTIONS = tuple(f"a picture of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in SHAPES)
