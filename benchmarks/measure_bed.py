"""Metrics of a method on a test bed: against real images of the same combination, and by the bed's readers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from beds.bed import Bed, BedSample
from diffusers import AutoencoderKL
from methods.setting import Edit, Sampler, device
from PIL import Image

from diffusers_ctx.evaluation import conformity, counterfactual_error
from diffusers_ctx.evaluation.features import Features, latent_features
from diffusers_ctx.evaluation.report import measure_context


REAL_SEED, SAMPLE_SEED = 900_000, 5
TOLERANCE = 0.25  # of an attribute, in standard deviations over all contexts
_SCALE_SAMPLES = 50  # images of each context that these are measured on


def measure_combination(
    bed: Bed, sample: Sampler, interventions: tuple[str, ...], n: int, base: str
) -> dict[str, Any]:
    """Metrics of one combination of interventions.

    Real images of the combination are split in halves of `n`: held-out ones, but where a bed has no others than those
    of training (single contexts of `designs`). Samples have the captions of both halves. Those of the second half are
    compared with real images of the first, beside the second's own distance.

    Args:
        bed: the bed.
        sample: the method.
        interventions: the combination.
        n: half the number of samples.
        base: folder of the base, whose latents the kernel distance compares.

    Returns:
        The metrics of `measure_context`. Shares of samples: `right`, by attribute, which lie where those of the first
        half of real images do (see [`conformity`]); `all_right`, of which this is true of every attribute that a
        concept sets; and `subject`, whose other classes are their caption's. Each with `_real`, the share of the
        second half of real images.
    """
    real = bed.unseen(interventions, 2 * n, REAL_SEED)
    images = at_resolution(sample(real.captions, interventions, SAMPLE_SEED), bed.resolution)
    metrics: dict[str, Any] = dict(measure_context(images[n:], real.images[:n], real.images[n:], features_of(base)))
    read, true = bed.read(real.images), real.attributes
    shares = shares_right(bed, bed.read(images), true, true[:n], read[:n])
    of_real = shares_right(bed, read[n:], true[n:], true[:n], read[:n])
    return metrics | shares | {f"{name}_real": value for name, value in of_real.items()}


def measure_counterfactuals(
    bed: Bed, edit: Edit, factual: BedSample, interventions: tuple[str, ...]
) -> dict[str, Any]:
    """Metrics of what a method makes of observational images under other interventions.

    Args:
        bed: the bed.
        edit: the method's edits of the images.
        factual: the images.
        interventions: those of the counterfactuals.

    Returns:
        `error`, the mean absolute difference of pixels in [0, 1] to the true counterfactuals, and
        `error_unchanged`, that of the images themselves; shares as in [`measure_combination`].
    """
    truth = bed.counterfactual(factual, interventions)
    made = at_resolution(edit(interventions), bed.resolution)
    read_of_truth, true = bed.read(truth.images), truth.attributes
    return {
        "error": counterfactual_error(made, truth.images),
        "error_unchanged": counterfactual_error(factual.images, truth.images),
        **shares_right(bed, bed.read(made), true, true, read_of_truth),
    }


def shares_right(
    bed: Bed, read: np.ndarray, named: np.ndarray, true: np.ndarray, read_of_real: np.ndarray
) -> dict[str, Any]:
    """`right`, `all_right` and `subject` of attributes (n, A) that were read off images.

    Classes are held against the true ones of real images, numbers against those that were read off these, with a
    tolerance: where an intervention sets a constant, the reader's error is all its variance.

    Args:
        bed: the bed.
        read: (n, A), read off the images.
        named: (n, A), attributes of the real images whose captions they have.
        true: (m, A), attributes of the real images that they are held against.
        read_of_real: (m, A), read off these.

    Returns:
        `subject` is `None` on a bed without such an attribute.
    """
    set_by_concepts = [column for column, attribute in enumerate(bed.attributes) if attribute.concepts]
    of_captions = [
        column for column, attribute in enumerate(bed.attributes) if attribute.classes and not attribute.concepts
    ]
    has_classes = np.array([attribute.classes is not None for attribute in bed.attributes])
    reference = np.where(has_classes, true, read_of_real)
    scales = _scales(bed)
    found = conformity(*((values / scales)[:, set_by_concepts] for values in (read, reference)), tolerance=TOLERANCE)
    names = [bed.attributes[column].name for column in set_by_concepts]
    met = (read[:, of_captions] == named[:, of_captions]).all(axis=1).mean()
    return {
        "right": dict(zip(names, map(float, found.per_attribute))),
        "all_right": found.joint,
        "subject": float(met) if of_captions else None,
    }


@cache
def _scales(bed: Bed) -> np.ndarray:
    """Each attribute's standard deviation (A,) over real images of all contexts; 1 for classes."""
    samples = [bed.unseen(names, _SCALE_SAMPLES, REAL_SEED) for names in bed.contexts.values()]
    attributes = np.concatenate([sample.attributes for sample in samples])
    is_number = np.array([attribute.classes is None for attribute in bed.attributes])
    return np.where(is_number, np.nanstd(attributes, axis=0), 1.0)


def at_resolution(images: np.ndarray, resolution: int) -> np.ndarray:
    """Images (n, H, W, 3) uint8 at the height and width of a bed's own, each pixel the mean of what it covers."""
    if images.shape[1] == resolution:
        return images
    size = (resolution, resolution)
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images])


@cache
def features_of(base: str) -> Features:
    """A base's latents."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)
    return latent_features(vae.requires_grad_(False).to(device()))
