"""What images would have been under other interventions: abduction, action and prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ctx.adapter import ContextAdapterMixin, add_context_tokens
from diffusers_ctx.adapter.image_features import ClipFeatures, ImageFeatures
from diffusers_ctx.autoencoding import decode_latents, encode_pixels, to_pixels
from diffusers_ctx.context import GaussianPosterior, Interventions

from .callbacks import StepCallback, callback_inputs, keeping_images
from .conditioning import Conditioner
from .inversion import Model, denoise, invert, noise_schedule
from .outputs import ComposablePipelineOutput


class CounterfactualMixin(ContextAdapterMixin):
    """Gives a pipeline with a context adapter what goes from images back to noise."""

    vae: AutoencoderKL
    vae_scale_factor: int
    image_processor: VaeImageProcessor
    maybe_free_model_hooks: Callable[[], None]
    _clip_features: ClipFeatures | None = None  # loaded by `load_posterior_encoder`

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

    @torch.no_grad()
    def counterfactual(
        self,
        image: PipelineImageInput,
        interventions: Interventions | Sequence[Interventions] = None,
        factual_interventions: Interventions | Sequence[Interventions] = None,
        prompt: str | list[str] = "",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ComposablePipelineOutput | tuple:
        r"""What given images would have been under other interventions.

        Abduction infers the concepts' exogenous noise by the posterior, and the diffusion noise by inverting the
        denoising ODE. Action replaces the factual mechanisms by those of `interventions`. Prediction generates from
        both noises. Equal interventions return the images, as far as the VAE and the inversion can.

        Args:
            image: one image or several, see `infer_exogenous_noise`.
            interventions: those of the counterfactual, as in `__call__`.
            factual_interventions: those under which the images arose.
            prompt: describes the images; one for all or one each.
            num_inference_steps: steps of the inversion, and of the generation.
            guidance_scale: classifier-free guidance, used in the inversion and in the generation; up to 1 there is
                none. Inversion becomes less exact the higher it is.
            negative_prompt: what guidance leads away from; one for all or one each.
            generator: draws the exogenous noise from its posterior: repeated calls show how much the images leave
                open. By default the noise is the posterior's mean, and the result deterministic.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`ComposablePipelineOutput`] instead of a tuple of images and exogenous
                noise.
            callback_on_step_end: called after each step of the generation with the pipeline, the step's number, its
                timestep and a dictionary of tensors; `"latents"` in what it returns replaces them.
            callback_on_step_end_tensor_inputs: names of the tensors for the callback; there is `"latents"` alone.

        Raises:
            ValueError: if no adapter is loaded, a concept is unknown, numbers of prompts or generators do not fit,
                `num_inference_steps` is below 1, or the callback asks for other tensors.
        """
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}; it must be 1 or more.")
        names = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        unknown = set(names) - {"latents"}
        if unknown:
            raise ValueError(f"Callbacks of counterfactuals are given `latents`, and no {sorted(unknown)}.")
        pixels = self._preprocess(image)
        factual_mask, mask = (self._mask(given, len(pixels)) for given in (factual_interventions, interventions))
        if isinstance(generator, list) and len(generator) != len(pixels):
            raise ValueError(f"`generator` has {len(generator)} entries for {len(pixels)} images.")
        latents = self._encode_images(pixels)
        posterior = self._posterior(pixels, latents, factual_mask)
        noise = posterior.mean
        if generator is not None:
            noise = posterior.at(randn_tensor(noise.shape, generator, noise.device, noise.dtype))
        texts = _one_each(prompt, len(latents), "prompt")
        if guidance_scale > 1:
            texts = _one_each(negative_prompt or "", len(latents), "negative_prompt") + texts
        conditioner = Conditioner.of(self)
        geometry = conditioner.full_image_geometry(latents).repeat(len(texts) // len(latents), 1)
        conditions = conditioner.unet_kwargs(conditioner.encode_captions(texts), geometry)

        def model_under(context: torch.Tensor) -> Model:
            return self._guided_model(conditions, self._context_tokens(noise, context), guidance_scale)

        def on_step(step: int, timestep: int, sample: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return sample
            callback = keeping_images(callback_on_step_end, len(sample))
            return callback(self, step, timestep, dict.fromkeys(names, sample)).get("latents", sample)

        schedule = noise_schedule(self.scheduler.config, num_inference_steps, latents.device)
        # in single precision, or generation would not undo the inversion
        diffusion_noise = invert(model_under(factual_mask), latents.float(), *schedule)
        self._num_timesteps, self._interrupt = num_inference_steps, False  # callbacks use them, as in a call
        is_interrupted = lambda: self._interrupt  # noqa: E731
        with self._scaled_for_call():
            predicted = denoise(model_under(mask), diffusion_noise, *schedule, on_step, is_interrupted)
        images = predicted.to(latents.dtype)
        if output_type != "latent":
            decoded = decode_latents(self.vae, images)
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ComposablePipelineOutput(images, noise) if return_dict else (images, noise)

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
            ValueError: if it cannot be loaded, or no adapter is loaded that names it.
        """
        name = pretrained_model_name_or_path or self._require_context_module().config.posterior_encoder_model
        if name is None:
            raise ValueError(
                "The adapter's posterior uses the image encoder of the pipeline that it was trained on: load one that"
                " has it as component `image_encoder`, or name the CLIP model."
            )
        self._clip_features = ClipFeatures.from_pretrained(name, cache_dir)

    def unload_context_adapter(self) -> None:
        super().unload_context_adapter()
        self._clip_features = None

    def _guided_model(self, conditions: dict[str, Any], tokens: torch.Tensor, guidance_scale: float) -> Model:
        """The UNet under a context's tokens; with guidance, the unconditional half of `conditions` comes first."""
        copies = 2 if guidance_scale > 1 else 1  # of the context, which guidance leaves alone
        kwargs = add_context_tokens(conditions, tokens)

        def model(x: torch.Tensor, t: int) -> torch.Tensor:
            predicted = self.unet(torch.cat([x] * copies).to(tokens.dtype), t, **kwargs, return_dict=False)[0]
            if copies == 1:
                return predicted
            unconditional, conditional = predicted.chunk(2)
            return unconditional + guidance_scale * (conditional - unconditional)

        return model

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

    def _image_features(self, encoder: Literal["vae", "unet", "clip"]) -> ImageFeatures | None:
        """Extracts the features that a posterior takes; `None` if it takes latents.

        Raises:
            ValueError: if the image encoder is not there and cannot be loaded.
        """
        if encoder == "vae":
            return None
        if encoder == "unet":
            return Conditioner.of(self).unet_features()
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


def _one_each(texts: str | list[str], num_images: int, name: str) -> list[str]:
    if isinstance(texts, str):
        return [texts] * num_images
    if len(texts) != num_images:
        raise ValueError(f"`{name}` has {len(texts)} entries for {num_images} images; give one for all or each.")
    return list(texts)
