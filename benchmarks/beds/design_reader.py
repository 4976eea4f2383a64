"""Reads attributes off small drawings: linear classifiers of their edges and colors.

Samples of a latent diffusion model are no sharper than its autoencoder lets them be, so classifiers also learn from
drawings that went through one. Edges are histograms of oriented gradients (Dalal and Triggs, 2005); colors, how much
of the image is near each color of a palette that is learned, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from scipy.special import softmax
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import RidgeClassifier


COLORS = 64  # of the palette
NEAR = 0.06  # distance of colors that count as alike, where black and white are √3 apart
ORIENTATIONS = 8
PENALTY = 5  # of squared coefficients
_CHUNK = 128  # images at once, for memory


@dataclass(frozen=True)
class Reader:
    """Linear classifiers, one for each attribute.

    Attributes:
        palette: (`COLORS`, 3) in [0, 1].
        coefficients: for each attribute (classes, features) in the order edges, colors.
        intercepts: for each attribute (classes,).
    """

    palette: np.ndarray
    coefficients: list[np.ndarray]
    intercepts: list[np.ndarray]

    def read(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class (n, attributes) of each attribute, for images (n, R, R, 3) uint8."""
        features = np.concatenate([edge_features(images), color_features(images, self.palette)], 1)
        scores = [features @ weights.T + bias for weights, bias in zip(self.coefficients, self.intercepts)]
        return np.stack([score.argmax(1) for score in scores], 1)


def train_reader(images: np.ndarray, labels: np.ndarray, vae: AutoencoderKL, seed: int = 0) -> Reader:
    """A reader that learned from labelled images as they are, as an autoencoder returns them, and a little distorted.

    Args:
        images: (n, R, R, 3) uint8, R a multiple of 4.
        labels: (n, attributes), classes as numbers from 0, each of which occurs; NaN where one is not known.
        vae: the autoencoder, in single precision.
        seed: of versions and palette.
    """
    generator = np.random.default_rng(seed)
    images = np.concatenate([images, autoencoded(images, vae, seed)])
    images = np.concatenate([images, [distort(image, generator) for image in images]])
    labels = np.tile(labels, (4, 1))
    pixels = images[:, ::6, ::6].reshape(-1, 3) / 255
    palette = MiniBatchKMeans(COLORS, random_state=seed, n_init=1).fit(pixels).cluster_centers_.astype(np.float32)
    features = np.concatenate([edge_features(images), color_features(images, palette)], 1)
    reader = Reader(palette, [], [])
    for column in labels.T:
        known = ~np.isnan(column)
        model = RidgeClassifier(alpha=PENALTY).fit(features[known], column[known])
        weights, bias = _of_each_class(model)
        reader.coefficients.append(weights)
        reader.intercepts.append(bias)
    return reader


def cached_reader(cache_dir: Path, images: np.ndarray, labels: np.ndarray, vae: AutoencoderKL) -> Reader:
    """`train_reader`'s reader, from a file if this code has learned from these images before."""
    weights = [parameter.detach().numpy().tobytes() for parameter in vae.parameters()]
    lessons = [Path(__file__).read_bytes(), images.tobytes(), labels.tobytes(), *weights]
    file = cache_dir / f"reader-{hashlib.sha256(b''.join(lessons)).hexdigest()[:16]}.npz"
    if not file.exists():
        reader = train_reader(images, labels, vae)
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".partial.npz")
        np.savez(unfinished, reader.palette, *reader.coefficients, *reader.intercepts)
        unfinished.replace(file)
    palette, *arrays = np.load(file).values()
    return Reader(palette, arrays[: labels.shape[1]], arrays[labels.shape[1] :])


@torch.no_grad()
def autoencoded(images: np.ndarray, vae: AutoencoderKL, seed: int = 0) -> np.ndarray:
    """Images (n, R, R, 3) uint8 decoded from latents that an autoencoder draws for them."""
    generator = torch.Generator().manual_seed(seed)
    decoded = []
    for chunk in _chunks(images):
        pixels = torch.from_numpy(chunk).permute(0, 3, 1, 2) * 2 - 1
        latents = vae.encode(pixels).latent_dist.sample(generator)
        decoded.append(((vae.decode(latents).sample.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255))
    return torch.cat(decoded).numpy().astype(np.uint8)


def edge_features(images: np.ndarray) -> np.ndarray:
    """(n, `ORIENTATIONS` × cells): how strong edges of each orientation are in cells of 8 × 8 pixels, 4 apart."""
    return np.concatenate([_edge_features(chunk) for chunk in _chunks(images)])


def color_features(images: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(n, colors): how much of an image is near each color."""
    features = []
    for chunk in _chunks(images):
        pixels = chunk[:, ::2, ::2].reshape(len(chunk), -1, 3)
        distances = (pixels**2).sum(-1, keepdims=True) - 2 * pixels @ palette.T + (palette**2).sum(1)
        features.append(softmax(-distances / (2 * NEAR**2), axis=2).mean(1))
    return 2 * np.sqrt(np.concatenate(features))  # weighs colors about as much as edges


def distort(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A version that is moved, turned and scaled a little, on white; one in three blurred, all with some noise."""
    angle, scale = 0.06 * generator.standard_normal(), 1 + 0.05 * generator.standard_normal()
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array(image.shape[:2]) / 2
    shift = centre - matrix @ centre + generator.standard_normal(2)
    coefficients = np.column_stack([matrix, shift]).ravel()
    drawing = Image.fromarray(image)
    drawing = drawing.transform(
        drawing.size, Image.Transform.AFFINE, tuple(coefficients), Image.Resampling.BILINEAR, fillcolor="white"
    )
    if generator.random() < 1 / 3:
        drawing = drawing.filter(ImageFilter.GaussianBlur(1))
    noise = 15 * generator.random() * generator.standard_normal(image.shape)
    return np.clip(np.asarray(drawing) + noise, 0, 255).astype(np.uint8)


def _edge_features(images: np.ndarray) -> np.ndarray:
    n, size = images.shape[:2]
    down, right = np.gradient(images, axis=(1, 2))
    strongest = (down**2 + right**2).argmax(-1)[..., None]
    down, right = (np.take_along_axis(slope, strongest, -1)[..., 0] for slope in (down, right))
    strength, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS
    features = []
    for orientation in range(ORIENTATIONS):
        apart = np.abs(angle - orientation)
        share = np.clip(1 - np.minimum(apart, ORIENTATIONS - apart), 0, None)
        quarters = (share * strength).reshape(n, size // 4, 4, size // 4, 4).mean((2, 4))
        cells = quarters[:, 1:, 1:] + quarters[:, 1:, :-1] + quarters[:, :-1, 1:] + quarters[:, :-1, :-1]
        features.append(np.sqrt(cells / 4).reshape(n, -1))
    return np.concatenate(features, 1)


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images in [0, 1], some at a time."""
    for start in range(0, len(images), _CHUNK):
        yield images[start : start + _CHUNK].astype(np.float32) / 255


def _of_each_class(model: RidgeClassifier) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and intercepts of each class, where scikit-learn has those of the second of two alone."""
    weights, bias = model.coef_.reshape(-1, model.n_features_in_), model.intercept_.reshape(-1)
    if len(weights) == 1:
        return np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
    return weights, bias
