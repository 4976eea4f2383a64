"""Held-out images: those that an adapter is measured on, and those that its training is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..keyed_random import keyed_seed
from .contexts import context_mask, interventions_of


@dataclass(frozen=True)
class HeldOutContext:
    """Two halves of a context's images, as rows of the dataset.

    Attributes:
        interventions: what the context intervenes on.
        real: rows to compare samples with.
        real_b: as many other rows, for the real-vs-real baseline.
    """

    interventions: tuple[str, ...]
    real: list[int]
    real_b: list[int]


def split_held_out(
    contexts: Sequence[str],
    concepts: Sequence[str],
    obs_context: str = "obs",
    max_images: int | None = None,
    seed: int = 0,
) -> dict[str, HeldOutContext]:
    """Splits each context's images in two halves at random.

    Args:
        contexts: the context's name of every row.
        concepts: concepts that can be intervened on.
        obs_context: the observational context's name.
        max_images: most images in a half.
        seed: seed of the split; it is the same for a context whatever others there are.

    Returns:
        the halves by context: the observational one first, then those with one intervention, then compositions.

    Raises:
        ValueError: if a context intervenes on an unknown concept or has fewer than 4 images.
    """
    names = np.array(contexts)
    try:
        context_mask(names.tolist(), concepts, obs_context)
    except ValueError as error:
        raise ValueError(f"The adapter was not trained for this context: {error} Take its images out.") from error
    halves = {}
    for name in sorted(set(contexts), key=lambda name: (len(interventions_of(name, obs_context)), name)):
        rows = _shuffled_rows(names, name, seed)
        n = min(len(rows) // 2, max_images or len(rows))
        if n < 2:
            raise ValueError(
                f"The context {name!r} has {len(rows)} images; the two halves need 2 each, and better hundreds."
            )
        halves[name] = HeldOutContext(interventions_of(name, obs_context), rows[0 : 2 * n : 2], rows[1 : 2 * n : 2])
    return halves


def hold_out(contexts: Sequence[str], images_per_context: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on, both in order: this many images of each context, drawn at random.

    Args:
        contexts: the context's name of every row.
        images_per_context: how many of each context to hold out.
        seed: seed of the draw.

    Raises:
        ValueError: if a context would have no image left to train on.
    """
    names = np.array(contexts)
    held_out: list[int] = []
    for name in sorted(set(contexts)):
        rows = _shuffled_rows(names, name, seed)
        if len(rows) <= images_per_context:
            raise ValueError(
                f"The context {name!r} has {len(rows)} images, so {images_per_context} cannot be held out; lower"
                " `validation_images`."
            )
        held_out += rows[:images_per_context]
    return sorted(set(range(len(names))) - set(held_out)), sorted(held_out)


def _shuffled_rows(names: np.ndarray, context: str, seed: int) -> list[int]:
    """The context's rows, in an order that is the same whatever other contexts there are."""
    return np.random.default_rng(keyed_seed(seed, "held out")).permutation(np.flatnonzero(names == context)).tolist()
