"""What the benchmark measures of a sampler on quad."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
from methods.setting import Sampler
from scipy.stats import wasserstein_distance

from diffusers_ctx import ContextModule
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    conformity,
    edge_auroc,
    image_diversity,
    interference_matrix,
    mean_difference,
    read_attributes,
    spillover,
    structural_hamming_distance,
)
from diffusers_ctx.evaluation.quad_attributes import attribute_difference
from diffusers_ctx.evaluation.report import measure_context


TRIPLES = (("quad1", "quad2", "quad4"), ("quad1", "quad3", "orientation"), ("quad2", "size", "orientation"))
COMBINATIONS = {
    "+".join(names) or "obs": names for names in (*quad.contexts().values(), *quad.HELD_OUT_PAIRS, *TRIPLES)
}
REAL_SEED, AGAIN_SEED, SAMPLE_SEED = 3_000_000, 3_000_001, 5
READ_SAMPLES = 2000  # attributes are read off no more of them: it takes as long as sampling does
INTERFERENCE_SAMPLES = 200
EDGE_SHARE = 0.25  # of the strongest edge; weaker ones are not counted as learned
# read modulo its shape's period, an orientation fills its range under any law
_READ = [name for name in quad.FACTORS if name != "orientation"]


@cache
def real_sample(
    interventions: tuple[str, ...], n: int, seed: int, dependent: bool
) -> tuple[quad.QuadSample, np.ndarray]:
    """Held-out images and the attributes (m, 8) read off the first of them."""
    sample = quad.generate(interventions, n, seed, dependent)
    return sample, read_attributes(sample.images[:READ_SAMPLES]).values


def measure_combination(sample: Sampler, interventions: tuple[str, ...], n: int, dependent: bool) -> dict[str, Any]:
    """Figures of one combination of interventions.

    Returns:
        All that `measure_context` returns, and `diversity` of the images, `conformity` of the attributes that were
        intervened on beside that of real images, and the mean `drift`, in unit coordinates, of those that neither
        were nor descend from one that was, beside that of real images.
    """
    (real, real_values), (again, again_values) = (
        real_sample(interventions, n, seed, dependent) for seed in (REAL_SEED, AGAIN_SEED)
    )
    images = sample(again.captions, interventions, SAMPLE_SEED)
    figures = measure_context(images, real.images, again.images)
    figures["diversity"] = image_diversity(images, real.images)
    values = read_attributes(images[:READ_SAMPLES]).values
    queried = [quad.FACTORS.index(name) for name in interventions if name in _READ]
    if queried:
        figures["conformity"] = conformity(values[:, queried], real_values[:, queried]).joint
        figures["conformity_real"] = conformity(again_values[:, queried], real_values[:, queried]).joint
    moved = _may_move(interventions, dependent)
    figures["drift"] = attribute_drift(values, real_values, moved)
    figures["drift_real"] = attribute_drift(again_values, real_values, moved)
    return figures


def measure_interference(sample: Sampler, dependent: bool) -> dict[str, Any]:
    """What single interventions move, with the same noise and captions before and after; see `interference_matrix`."""
    first, first_values = real_sample((), INTERFERENCE_SAMPLES, REAL_SEED, dependent)
    _, second_values = real_sample((), INTERFERENCE_SAMPLES, AGAIN_SEED, dependent)

    def read(interventions: Sequence[str]) -> np.ndarray:
        return read_attributes(sample(first.captions, interventions, SAMPLE_SEED)).values

    scale = mean_difference(first_values, second_values, attribute_difference)
    matrix = interference_matrix(read(()), [read((name,)) for name in quad.CONCEPTS], scale, attribute_difference)
    truth = [read_attributes(first.counterfactual((name,)).images).values for name in quad.CONCEPTS]
    true_matrix = interference_matrix(first_values, truth, scale, attribute_difference)
    allowed = np.array([[f in _may_move((c,), dependent) for f in quad.FACTORS] for c in quad.CONCEPTS])
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


def _may_move(interventions: Sequence[str], dependent: bool) -> set[str]:
    """The factors that interventions set, and in the dependent variant those that descend from them."""
    below = (quad.descendants(name) for name in interventions) if dependent else ()
    return set(interventions).union(*below)


def attribute_drift(values: np.ndarray, reference: np.ndarray, moved: Collection[str] = ()) -> float | None:
    """Mean Wasserstein distance of the laws of attributes (n, 8) that did not have to move, where they could be read.

    Where none could, 1; `None` if all have moved.
    """
    still = [quad.FACTORS.index(name) for name in _READ if name not in moved]
    pairs = [(values[:, column], reference[:, column]) for column in still]
    readable = [(a[~np.isnan(a)], b[~np.isnan(b)]) for a, b in pairs]
    distances = [wasserstein_distance(a, b) if len(a) else 1.0 for a, b in readable]
    return float(np.mean(distances)) if distances else None


def shape_met(values: np.ndarray, captions: Sequence[str]) -> float:
    """Share of attributes (n, 8) whose shape is the one that the first n captions name."""
    named = [next(index for index, name in enumerate(quad.SHAPES) if name in caption) for caption in captions]
    return float(np.mean(np.rint(3 * values[:, quad.FACTORS.index("shape")]) == named[: len(values)]))


def _as_lists(matrix: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(entry) else round(float(entry), 4) for entry in row] for row in matrix]
