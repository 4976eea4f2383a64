"""What a run starts with: its images, its context module and its number of steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import datasets

from ..adapter.image_features import ImageFeatures
from ..context import ContextModule
from ..data import load_context_dataset
from ..pipelines import CompositionMixin
from .config import TrainingConfig
from .encoding.posterior_features import posterior_input


def load_images(config: TrainingConfig) -> datasets.Dataset:
    """The run's images; see [`~data.load_context_dataset`]."""
    data = config.data
    return load_context_dataset(
        Path(data.train_data_dir) if data.train_data_dir else str(data.dataset_name),
        obs_context=data.obs_context,
        concepts=data.concepts,
        image_column=data.image_column,
        context_column=data.context_column,
        text_column=data.caption_column,
        name=data.dataset_config_name,
        split=data.dataset_split,
        skip_unreadable=data.skip_unreadable,
        cache_dir=data.cache_dir,
        max_samples_per_context=data.max_train_samples,
        seed=config.optimization.seed,
    )


def describe_images(images: datasets.Dataset, concepts: Sequence[str]) -> str:
    """A line about what was found: the contexts, how many images and captions each has, and the concepts."""
    contexts = list(images["context"])
    captions = Counter(context for context, caption in zip(contexts, images["text"]) if caption)
    found = [f"{name} {count} ({captions[name]})" for name, count in sorted(Counter(contexts).items())]
    return f"Images (captions) by context: {', '.join(found)}. Concepts: {', '.join(concepts)}."


def create_context_module(
    config: TrainingConfig,
    pipeline: CompositionMixin,
    concepts: list[str],
    image_features: ImageFeatures | None,
    resolution: int,
) -> ContextModule:
    """A new context module for the pipeline's UNet and the images that its posterior will see.

    Args:
        config: the run.
        pipeline: the base model.
        concepts: the concepts, in order.
        image_features: what makes the features that the posterior sees, if it does not see latents.
        resolution: height and width of the images.
    """
    options = config.context
    return ContextModule(
        concepts=concepts,
        token_dim=pipeline.unet.config.cross_attention_dim,
        obs_context=config.data.obs_context,
        num_hidden_factors=options.num_hidden_factors,
        noise_dim=options.noise_dim,
        concept_dim=options.noise_dim,
        expressive_depth=options.expressive_depth,
        causal_form=options.causal_form,
        graph=config.graph_edges(),
        tokens_per_concept=options.tokens_per_concept,
        posterior_type=options.posterior_type,
        caption_dim=pipeline.unet.config.cross_attention_dim,
        **posterior_input(options, pipeline, image_features, resolution),
    )


def count_steps(config: TrainingConfig, images: int, global_batch_size: int) -> int:
    """Optimizer steps of a run with so many images in an epoch, and in a batch of all processes together.

    Raises:
        ValueError: if there are too few images for one step.
    """
    options = config.optimization
    if config.data.streaming and options.max_train_steps:
        return options.max_train_steps
    batches = images // global_batch_size
    if not batches:
        raise ValueError(
            f"An epoch has {images} images, fewer than the {global_batch_size} of a step; lower `train_batch_size`."
        )
    steps = options.max_train_steps or options.num_train_epochs * batches // options.gradient_accumulation_steps
    if not steps:
        raise ValueError(
            f"{options.num_train_epochs} epochs of {batches} batches make no step of"
            f" {options.gradient_accumulation_steps} batches; raise `num_train_epochs` or set `max_train_steps`."
        )
    return steps
