"""Abduction: the exogenous noise that explains images, and noise of single concepts taken from reference images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor

from diffusers_ctx.adapter import ContextAdapterMixin
from diffusers_ctx.adapter.image_features import ClipFeatures, ImageFeatures
from diffusers_ctx.autoencoding import encode_pixels, to_pixels
from diffusers_ctx.context import GaussianPosterior, Interventions, PosteriorEncoder
from diffusers_ctx.context.names import normal_name

from .conditioning import Conditioner
from .references import Reference


class AbductionMixin(ContextAdapterMixin):
    """Adds the posterior of exogenous noise to a pipeline with a context adapter."""

    vae: AutoencoderKL
    vae_scale_factor: int
    image_processor: VaeImageProcessor
    maybe_free_model_hooks: Callable[[], None]

    @torch.no_grad()
    def infer_exogenous_noise(
        self,
        image: PipelineImageInput,
        factual_interventions: Interventions | Sequence[Interventions] = None,
    ) -> torch.Tensor:
        """The exogenous noise (B, N, d_z) that explains images: the mean of its posterior.

        Args:
            image: one image or several, as PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W). PIL images are
                resized and cropped to the size that the adapter was trained on; arrays and tensors keep their size.
                Floating-point values lie in [0, 1], integers in 0 to 255.
            factual_interventions: the interventions under which the images arose, as in `__call__`; `None` if they
                are observational.

        Raises:
            ValueError: if no adapter is loaded, a concept is unknown, or the posterior's image encoder is missing.
        """
        pixels = self._preprocess(image)
        mask = self._mask(factual_interventions, len(pixels))
        noise = self._posterior(pixels, self._encode_images(pixels), mask).mean
        self.maybe_free_model_hooks()
        return noise

    def load_posterior_encoder(
        self, pretrained_model_name_or_path: str | None = None, cache_dir: str | os.PathLike | None = None
    ) -> None:
        """Loads the CLIP image encoder whose features the posterior of an adapter was trained on.

        `infer_exogenous_noise` and `counterfactual` call it if the adapter needs it and the pipeline has no component
        `image_encoder`.

        Args:
            pretrained_model_name_or_path: folder or Hub id; by default the name in the adapter's config, which is
                without its path if it was a local folder.
            cache_dir: where downloads are kept.

        Raises:
            ValueError: if it cannot be loaded, no adapter is loaded, or neither you nor the adapter name it.
        """
        config = self._require_context_module().config
        name = pretrained_model_name_or_path or config.posterior_encoder_model
        if name is None:
            raise ValueError(
                "The adapter's posterior uses the image encoder of the pipeline that it was trained on: load one that"
                " has it as component `image_encoder`, or name the CLIP model."
            )
        self._backbone.adapter.clip_features = ClipFeatures.from_pretrained(name, cache_dir)

    @property
    def _clip_features(self) -> ClipFeatures | None:
        """What `load_posterior_encoder` has loaded: it goes with the adapter, which pipelines may share."""
        return self._backbone.adapter.clip_features

    def _transplant(self, noise: torch.Tensor, references: Sequence[Mapping[str, Reference]]) -> torch.Tensor:
        """Noise (B, N, d_z) in which concepts have the noise of reference images, by name for each row.

        It is inferred as under an intervention on the concept, under which nothing else affects the concept: so
        intervened on, it has the value that is read off the reference, in whatever context that arose.

        Raises:
            ValueError: if a concept has no exogenous noise, or a reference is not one image.
        """
        if not any(references):
            return noise
        concepts, noise = self.concepts, noise.clone()
        inferred: dict[tuple, torch.Tensor] = {}  # an image may be the reference of several rows
        for row, given in zip(noise, references):
            for image in {id(image): image for image in given.values()}.values():
                names = [name for name in given if given[name] is image]
                key = (id(image), *names)
                if key not in inferred:
                    inferred[key] = self._noise_of_reference(image, names)
                nodes = [concepts.index(normal_name(name)) for name in names]
                row[nodes] = inferred[key][nodes].to(row)
        return noise

    def _noise_of_reference(self, image: Reference, names: list[str]) -> torch.Tensor:
        """The noise (N, d_z) of an image, if it arose under interventions on these concepts."""
        without = {normal_name(name) for name in names} & set(
            self._require_context_module().config.nodes_without_noise
        )
        if without:
            raise ValueError(
                f"{sorted(without)} have no exogenous noise in this adapter, which a reference image could give; an"
                " intervention on them has one effect alone."
            )
        pixels = self._preprocess(image)
        if len(pixels) != 1:
            raise ValueError(f"The reference image of {names} holds {len(pixels)} images; give one.")
        return self._posterior(pixels, self._encode_images(pixels), self._mask(names, 1)).mean[0]

    def _posterior(self, pixels: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        """The posterior of the exogenous noise of images that arose under the factual interventions of a mask."""
        inputs = self._posterior_input(pixels, latents)
        with self._context_module_on_device() as (module, device):
            return module.posterior(inputs.to(device), mask.to(device))

    def _posterior_input(self, pixels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        config = self._require_context_module().config
        image_features = self._image_features(config.posterior_encoder)
        if image_features is None:
            return latents
        if image_features.channels != config.posterior_in_channels:
            raise ValueError(
                f"The image encoder has features of {image_features.channels} channels, and the adapter's posterior"
                f" takes {config.posterior_in_channels}: call `load_posterior_encoder(...)` with the CLIP model that"
                f" it was trained with, {config.posterior_encoder_model or 'the image encoder of its base model'}."
            )
        return image_features(pixels.to(self._execution_device), latents)

    def _image_features(self, encoder: PosteriorEncoder) -> ImageFeatures | None:
        """Extracts the features that a posterior takes; `None` if it takes latents.

        Raises:
            ValueError: if the image encoder is not there and cannot be loaded.
        """
        if encoder == "vae":
            return None
        if encoder == self._backbone.component:
            return Conditioner.of(self).backbone_features()
        if self._clip_features is None and getattr(self, "image_encoder", None) is not None:
            return ClipFeatures(self.image_encoder)
        if self._clip_features is None:
            self.load_posterior_encoder()
        return self._clip_features

    def _preprocess(self, image: PipelineImageInput) -> torch.Tensor:
        return to_pixels(image, self.image_processor, self._training_resolution)

    @property
    def _training_resolution(self) -> int:
        """Height and width, in pixels, of the images that the adapter was trained on."""
        return self._require_context_module().config.posterior_sample_size * self.vae_scale_factor

    def _encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, _ = encode_pixels(self.vae, pixels, self._execution_device)
        return mean
