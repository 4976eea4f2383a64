"""The context module of a run."""

from __future__ import annotations

from ...adapter import backbone_of_pipeline
from ...adapter.image_features import ImageFeatures
from ...context import ContextModule
from ...pipelines import CompositionMixin
from ..config import TrainingConfig
from ..encoding.posterior_features import posterior_input


def create_context_module(
    config: TrainingConfig,
    pipeline: CompositionMixin,
    concepts: list[str],
    image_features: ImageFeatures | None,
    resolution: int,
) -> ContextModule:
    """A new context module for the pipeline's backbone and the images that its posterior will read.

    Args:
        config: the run.
        pipeline: the base model.
        concepts: the concepts, in order.
        image_features: makes the features that the posterior reads, if it does not read latents.
        resolution: height and width of the images.
    """
    options, width = config.context, backbone_of_pipeline(pipeline).token_dim
    return ContextModule(
        concepts=concepts,
        token_dim=width,
        obs_context=config.data.obs_context,
        num_hidden_factors=options.num_hidden_factors,
        noise_dim=options.noise_dim,
        concept_dim=options.noise_dim,
        expressive_depth=options.expressive_depth,
        causal_form=options.causal_form,
        graph=config.graph_edges(),
        tokens_per_concept=options.tokens_per_concept,
        posterior_type=options.posterior_type,
        caption_dim=width,
        nodes_without_noise=[],  # given, or diffusers takes it for a default that configurations need not have
        **posterior_input(options, pipeline, image_features, resolution),
    )
