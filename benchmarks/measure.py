"""The benchmark's metrics of a sampler on quad."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from methods.setting import Sampler, device
from scipy.stats import wasserstein_distance

from diffusers_ctx import ContextModule, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    conformity,
    debiased,
    diversity,
    edge_auroc,
    image_diversity,
    interference_matrix,
    kernel_distance,
    mean_difference,
    read_attributes,
    sliced_wasserstein_distance,
    spillover,
    structural_hamming_distance,
)
from diffusers_ctx.evaluation.features import Features, latent_features
from diffusers_ctx.evaluation.quad_attributes import attribute_difference
from diffusers_ctx.evaluation.report import measure_context


_ALL = (*quad.contexts().values(), *quad.HELD_OUT_PAIRS, *quad.HELD_OUT_TRIPLES)
COMBINATIONS = {"+".join(names) or "obs": names for names in _ALL}
REAL_SEED, REAL_B_SEED, SAMPLE_SEED = 3_000_000, 3_000_001, 5
FLOOR_SEEDS = range(3_100_000, 3_100_008)
READ_SAMPLES = 2000  # attributes are read off no more of them: reading takes as long as sampling
KERNEL_SAMPLES = 500  # images of the kernel distance at most: its expectation does not depend on their number
INTERFERENCE_SAMPLES = 200
_READING_ERROR = 2e-3  # of attributes that are read off real images, at most on average
EDGE_SHARE = 0.25  # of the strongest edge; weaker ones are not counted as learned
# read modulo its shape's period, an orientation fills its range under any distribution
_READ = [name for name in quad.FACTORS if name != "orientation"]


@cache
def real_sample(
    interventions: tuple[str, ...], n: int, seed: int, dependent: bool
) -> tuple[quad.QuadSample, np.ndarray]:
    """Held-out images and the attributes (m, 8) read off the first of them."""
    sample = quad.generate(interventions, n, seed, dependent)
    return sample, read_attributes(sample.images[:READ_SAMPLES]).values


@cache
def real_floor(interventions: tuple[str, ...], n: int, dependent: bool) -> float:
    """Real-vs-real baseline: root mean squared distance of n images of each of `FLOOR_SEEDS` to those of `REAL_SEED`.

    A baseline from one set would be off by a fifth, and in all combinations alike, as a seed has one noise in all.
    """
    real, _ = real_sample(interventions, n, REAL_SEED, dependent)
    others = (quad.generate(interventions, n, seed, dependent).images for seed in FLOOR_SEEDS)
    return float(np.sqrt(np.mean([sliced_wasserstein_distance(other, real.images) ** 2 for other in others])))


@cache
def features_of_base() -> Features:
    """The base's latents of the first images, which the kernel distance compares."""
    vae = AutoencoderKL.from_pretrained(embedded_base(), subfolder="vae", torch_dtype=torch.float32)
    latents = latent_features(vae.requires_grad_(False).to(device()))
    return lambda images: latents(images[:KERNEL_SAMPLES])


@cache
def real_features(interventions: tuple[str, ...], n: int, seed: int, dependent: bool) -> np.ndarray:
    """Features of held-out images."""
    sample, _ = real_sample(interventions, n, seed, dependent)
    return features_of_base()(sample.images)


def measure_kernel_distance(
    images: np.ndarray, interventions: tuple[str, ...], n: int, dependent: bool
) -> dict[str, float]:
    """`kid` of images to held-out ones, its standard error over subsets `kid_error`, and `kid_floor` of other ones."""
    real, real_b = (real_features(interventions, n, seed, dependent) for seed in (REAL_SEED, REAL_B_SEED))
    subset = len(real) // 2
    distance, error = kernel_distance(features_of_base()(images), real, subset)
    return {"kid": distance, "kid_error": error, "kid_floor": kernel_distance(real_b, real, subset)[0]}


def measure_combination(sample: Sampler, interventions: tuple[str, ...], n: int, dependent: bool) -> dict[str, Any]:
    """Metrics of one combination of interventions.

    Returns:
        The metrics of `measure_context`, with the baseline of `real_floor`, and of `measure_kernel_distance`;
        `diversity` of the images; `conformity` of the attributes that were intervened on, jointly, and `conformity_of`
        each; for attributes that must not move, `diversity_of` each and the mean `drift`, in unit coordinates;
        `shape_met`, the share of images with their caption's shape; and `conformity_real`, `drift_real` and
        `shape_met_real` of real images.
    """
    (real, real_values), (real_b, real_b_values) = (
        real_sample(interventions, n, seed, dependent) for seed in (REAL_SEED, REAL_B_SEED)
    )
    images = sample(real_b.captions, interventions, SAMPLE_SEED)
    metrics = measure_context(images, real.images, real_b.images)
    metrics["floor"] = real_floor(interventions, n, dependent)
    metrics["debiased"] = debiased(metrics["swd"], metrics["floor"])
    metrics |= measure_kernel_distance(images, interventions, n, dependent)
    metrics["diversity"] = image_diversity(images, real.images)
    values = read_attributes(images[:READ_SAMPLES]).values
    queried = [quad.FACTORS.index(name) for name in interventions if name in _READ]
    if queried:
        reference = real_values[:, queried]
        found = conformity(values[:, queried], reference, tolerance=_READING_ERROR)
        metrics["conformity"] = found.joint
        metrics["conformity_of"] = _by_factor(queried, found.per_attribute)
        metrics["conformity_real"] = conformity(real_b_values[:, queried], reference, tolerance=_READING_ERROR).joint
    moved = may_move(interventions, dependent)
    still = _columns_without(moved)
    if still:
        metrics["diversity_of"] = _by_factor(still, diversity(values[:, still], real_values[:, still]))
    metrics["drift"] = attribute_drift(values, real_values, moved)
    metrics["drift_real"] = attribute_drift(real_b_values, real_values, moved)
    metrics["shape_met"] = shape_met(values, real_b.captions)
    metrics["shape_met_real"] = shape_met(real_b_values, real_b.captions)
    return metrics


def measure_interference(sample: Sampler, dependent: bool) -> dict[str, Any]:
    """How far single interventions move attributes, at the same noise and captions; see `interference_matrix`."""
    first, first_values = real_sample((), INTERFERENCE_SAMPLES, REAL_SEED, dependent)
    _, second_values = real_sample((), INTERFERENCE_SAMPLES, REAL_B_SEED, dependent)

    def read(interventions: Sequence[str]) -> np.ndarray:
        return read_attributes(sample(first.captions, interventions, SAMPLE_SEED)).values

    scale = mean_difference(first_values, second_values, attribute_difference)
    matrix = interference_matrix(read(()), [read((name,)) for name in quad.CONCEPTS], scale, attribute_difference)
    truth = [read_attributes(first.counterfactual((name,)).images).values for name in quad.CONCEPTS]
    true_matrix = interference_matrix(first_values, truth, scale, attribute_difference)
    allowed = np.array([[f in may_move((c,), dependent) for f in quad.FACTORS] for c in quad.CONCEPTS])
    spilled = spillover(matrix, allowed)
    return {
        "matrix": _as_lists(matrix),
        "true_matrix": _as_lists(true_matrix),
        "forbidden": spilled.forbidden,
        "allowed": spilled.allowed,
    }


def measure_graph(module: ContextModule) -> dict[str, Any]:
    """How well the edges among the concepts were found, from the blocks' norms."""
    count = len(quad.CONCEPTS)
    strengths = module.causal.strengths().cpu().numpy()[:count, :count]
    true = np.array([[(cause, effect) in quad.EDGES for cause in quad.CONCEPTS] for effect in quad.CONCEPTS])
    return {
        "strengths": _as_lists(strengths),
        "auroc": edge_auroc(strengths, true),
        "shd": structural_hamming_distance(strengths, true, threshold=float(EDGE_SHARE * strengths.max())),
    }


def may_move(interventions: Sequence[str], dependent: bool) -> set[str]:
    """The factors that interventions set, and in the dependent variant those that descend from them."""
    below = (quad.descendants(name) for name in interventions) if dependent else ()
    return set(interventions).union(*below)


def attribute_drift(values: np.ndarray, reference: np.ndarray, moved: Collection[str] = ()) -> float | None:
    """Mean Wasserstein distance of the distributions of attributes (n, 8) that must not move, where they were read.

    An attribute that was never read counts as 1; `None` if all attributes may move.
    """
    pairs = [(values[:, column], reference[:, column]) for column in _columns_without(moved)]
    readable = [(a[~np.isnan(a)], b[~np.isnan(b)]) for a, b in pairs]
    distances = [wasserstein_distance(a, b) if len(a) else 1.0 for a, b in readable]
    return float(np.mean(distances)) if distances else None


def shape_met(values: np.ndarray, captions: Sequence[str]) -> float:
    """Share of attributes (n, 8) whose shape is the one that the first n captions name."""
    named = [next(index for index, name in enumerate(quad.SHAPES) if name in caption) for caption in captions]
    return float(np.mean(np.rint(3 * values[:, quad.FACTORS.index("shape")]) == named[: len(values)]))


def _columns_without(moved: Collection[str]) -> list[int]:
    """Columns of the attributes that must not move."""
    return [quad.FACTORS.index(name) for name in _READ if name not in moved]


def _by_factor(columns: Sequence[int], values: np.ndarray) -> dict[str, float]:
    return {quad.FACTORS[column]: float(value) for column, value in zip(columns, values)}


def _as_lists(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(entry) else round(float(entry), 4) for entry in row] for row in matrix]
