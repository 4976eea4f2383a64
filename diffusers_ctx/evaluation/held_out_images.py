"""Held-out images of an evaluation: two halves of each context, and their captions."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from ..data.decoding import square_crop
from ..data.held_out import split_held_out


class HeldOutImages:
    """Each context's images in two halves: samples are compared with the first, and have the prompts of the second.

    Args:
        dataset: the images, see [`~data.load_context_dataset`].
        concepts: concepts of the adapter.
        obs_context: name of the observational context.
        resolution: height and width of the images, in pixels.
        max_images: images in a half, at most.
        seed: seed of the split.

    Raises:
        ValueError: if a context intervenes on an unknown concept or has fewer than 4 images.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        concepts: Sequence[str],
        obs_context: str,
        resolution: int,
        max_images: int | None,
        seed: int,
    ):
        self.dataset, self.resolution = dataset, resolution
        self.captions = list(dataset["text"])
        self.contexts = split_held_out(dataset["context"], concepts, obs_context, max_images, seed)
        self.prompts = {name: [self.captions[row] for row in half.real_b] for name, half in self.contexts.items()}
        self.observational = self.contexts[obs_context]

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Images (n, H, W, 3) uint8 of these rows, resized and cropped in the center."""
        return np.array([np.asarray(square_crop(self.dataset[row]["image"], self.resolution)) for row in rows])
