"""The run's images, and the pixels and latents that the models are trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np
import torch
from PIL import Image

from ...data import load_context_dataset
from ...data.decoding import square_crop
from ...keyed_random import keyed_seed
from ...pipelines import CompositionMixin, describe_truncated
from ..config import TrainingConfig


logger = logging.getLogger(__name__)


def load_images(config: TrainingConfig) -> datasets.Dataset:
    """The run's images; see [`~data.load_context_dataset`]."""
    data = config.data
    return load_context_dataset(
        **data.source_options(),
        obs_context=data.obs_context,
        concepts=data.concepts,
        skip_unreadable=data.skip_unreadable,
        output_dir=config.output.output_dir,
        max_samples_per_context=data.max_train_samples,
        seed=config.optimization.seed,
    )


def describe_images(images: datasets.Dataset, concepts: Sequence[str]) -> str:
    """A line about what was found: the contexts, how many images and captions each has, and the concepts."""
    contexts = list(images["context"])
    captions = Counter(context for context, caption in zip(contexts, images["text"]) if caption)
    found = [f"{name} {count} ({captions[name]})" for name, count in sorted(Counter(contexts).items())]
    return f"Images (captions) by context: {', '.join(found)}. Concepts: {', '.join(concepts)}."


def warn_of_long_captions(pipeline: CompositionMixin, captions: Sequence[str], config: TrainingConfig) -> None:
    """Warns once of captions, and a prompt of the validation, that the text encoders take a part of only."""
    what = "captions of the images that the concepts are learned on" if config.data.streaming else "captions"
    lines = [
        describe_truncated(pipeline, captions, what),
        describe_truncated(pipeline, [config.output.validation_prompt or ""], "validation prompts"),
    ]
    for line in filter(None, lines):
        logger.warning(line)


class ImageTransform:
    """Resizes an image's shorter side to `resolution` and crops a square, in the center or at a random place.

    The place is drawn once per image, from its index: it does not depend on the order of reading.
    """

    def __init__(self, resolution: int, center_crop: bool, seed: int):
        self.resolution = resolution
        self.center_crop = center_crop
        self.seed = seed

    def __call__(self, image: Image.Image, index: int) -> torch.Tensor:
        """Pixels (3, resolution, resolution) in [-1, 1]."""
        square = square_crop(image, self.resolution, self._place(index))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1

    def geometry(self, image: Image.Image, index: int, flipped: bool = False) -> torch.Tensor:
        """The image's row (6,) of `Batch.geometry`; that of its mirror image if `flipped`."""
        scale = self.resolution / min(image.size)
        left, top = (place * (side * scale - self.resolution) for place, side in zip(self._place(index), image.size))
        if flipped:
            left = image.width * scale - self.resolution - left
        return torch.tensor([image.height, image.width, round(top), round(left), self.resolution, self.resolution])

    def _place(self, index: int) -> tuple[float, float]:
        """Where the crop lies from left to right and from top to bottom, in [0, 1]."""
        if self.center_crop:
            return 0.5, 0.5
        left, top = np.random.default_rng(keyed_seed(self.seed, "crop", index)).random(2)
        return left, top
