"""The input of the posterior in training: latents, or features of another network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...adapter import backbone_of_pipeline
from ...adapter.image_features import ClipFeatures, ImageFeatures
from ...adapter_format import public_name
from ...autoencoding import latent_size
from ...pipelines import CompositionMixin, Conditioner
from ..config import ContextConfig, PosteriorEncoder, TrainingConfig


def with_posterior_encoder(config: TrainingConfig, pipeline: CompositionMixin) -> TrainingConfig:
    """The config with a posterior encoder: the given one, or else the best that the base model and options allow."""
    if config.context.posterior_encoder is not None:
        return config
    backbone = backbone_of_pipeline(pipeline)
    if config.context.posterior_encoder_model is not None:
        encoder: PosteriorEncoder = "clip"
    elif config.model.mode == "full" or config.data.streaming or not backbone.has_features:
        encoder = "vae"
    else:
        encoder = backbone.component
    return replace(config, context=replace(config.context, posterior_encoder=encoder))


def create_image_features(config: TrainingConfig, pipeline: CompositionMixin) -> ImageFeatures | None:
    """The network whose features the posterior reads; `None` if it reads latents.

    Raises:
        ValueError: if the options contradict one another, or the CLIP model cannot be loaded.
    """
    encoder, model = config.context.posterior_encoder, config.context.posterior_encoder_model
    has_own = getattr(pipeline, "image_encoder", None) is not None
    backbone = backbone_of_pipeline(pipeline)
    if encoder not in ("vae", "clip", backbone.component):
        raise ValueError(f"The base model has no {encoder}; choose `posterior_encoder` {backbone.component}.")
    if encoder == backbone.component and config.model.mode == "full":
        raise ValueError(
            f"In mode full the {backbone.name} changes, and with it the features that the posterior learned on; choose"
            " mode frozen or lora, or another `posterior_encoder`."
        )
    if model is not None and encoder != "clip":
        raise ValueError(
            f"`posterior_encoder_model` names a CLIP model, and `posterior_encoder` is {encoder}; set it to clip, or"
            " leave the model out."
        )
    if encoder == "clip" and model is None and not has_own:
        raise ValueError(
            "The base model has no image encoder of its own; name a CLIP model by `posterior_encoder_model`, such as"
            " openai/clip-vit-large-patch14."
        )
    if model is not None and has_own:  # which inference of the noise would use
        raise ValueError("The base model has an image encoder of its own; leave out `posterior_encoder_model`.")
    if model is not None:
        return ClipFeatures.from_pretrained(model, config.data.cache_dir)
    if encoder == "clip":
        return ClipFeatures(pipeline.image_encoder)
    return Conditioner.of(pipeline).backbone_features() if encoder == backbone.component else None


def posterior_input(
    options: ContextConfig, pipeline: CompositionMixin, features: ImageFeatures | None, resolution: int
) -> dict[str, Any]:
    """Keyword arguments of the context module: the shape of its posterior's input for images of a resolution."""
    side = latent_size(pipeline.vae, resolution)
    latents = {"posterior_in_channels": pipeline.vae.config.latent_channels, "posterior_sample_size": side}
    if features is None:
        return latents
    return latents | {
        "posterior_in_channels": features.channels,
        "posterior_feature_size": features.size(side),
        "posterior_encoder": options.posterior_encoder,
        "posterior_encoder_model": public_name(options.posterior_encoder_model),
    }
