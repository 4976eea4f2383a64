"""Held-out images that an adapter is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .context_dataset import context_mask, interventions_of


@dataclass(frozen=True)
class HeldOutContext:
    """Two halves of a context's images, as rows of the dataset.

    Attributes:
        interventions: what the context intervenes on.
        real: rows to compare samples with.
        again: as many other rows, which tell how far apart real images are.
    """

    interventions: tuple[str, ...]
    real: list[int]
    again: list[int]


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
        max_images: at most so many images in a half.
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
        rows = np.random.default_rng(seed).permutation(np.flatnonzero(names == name)).tolist()
        n = min(len(rows) // 2, max_images or len(rows))
        if n < 2:
            raise ValueError(
                f"The context {name!r} has {len(rows)} images; the two halves need 2 each, and better hundreds."
            )
        halves[name] = HeldOutContext(interventions_of(name, obs_context), rows[0 : 2 * n : 2], rows[1 : 2 * n : 2])
    return halves
