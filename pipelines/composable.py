"""A Stable Diffusion pipeline that composes interventions on concepts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from diffusers_ctx.adapter import ContextAdapterLoaderMixin, weights_at_hand
from diffusers_ctx.context import Interventions, intervention_mask

from .guidance import context_guidance
from .inversion import denoise, evenly_spaced_timesteps, invert


@dataclass
class ComposablePipelineOutput(StableDiffusionPipelineOutput):
    """Images, and the exogenous noise (B, N, d_z) that they were made from: pass it in again to keep everything that
    an intervention does not touch. `None` without a context adapter."""

    exogenous_noise: torch.Tensor | None = None


class ComposablePipeline(ContextAdapterLoaderMixin, StableDiffusionPipeline):
    r"""[`StableDiffusionPipeline`] with interventions on the concepts of a context adapter.

    Without an adapter it is the plain pipeline. The exogenous noise is drawn from the generator without advancing it,
    so that the diffusion noise of a seed is that of the plain pipeline.

    Examples:

    ```py
    >>> from diffusers_ctx import ComposablePipeline

    >>> pipe = ComposablePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> pipe.load_context_adapter("user/weather-context")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    >>> pipe("a street in Lisbon", interventions={"night": 1.0, "snow": 0.4}).images[0]
    ```
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' own signature)
        interventions: Interventions | Sequence[Interventions] = None,
        exogenous_noise: torch.Tensor | None = None,
        context_guidance_scale: float = 1.0,
        **kwargs,
    ) -> ComposablePipelineOutput | tuple:
        r"""Generates images under interventions.

        Takes every argument of [`StableDiffusionPipeline.__call__`], and

        Args:
            interventions: concepts to intervene on: a list of names, a mapping from names to strengths in [0, 1], or
                one of these per prompt. None is the observational context.
            exogenous_noise (`torch.Tensor` of shape (number of images, N, d_z), *optional*): the concepts' noise,
                drawn from `generator`, or from torch's own on the CPU, if not given.
            context_guidance_scale (`float`): exaggerates (above 1) or weakens (below 1) the contrast between the
                interventions and the observational context; 1 costs nothing.

        Returns:
            [`ComposablePipelineOutput`], or if `return_dict` is `False` a tuple of images, safety flags and, with a
            context adapter, the exogenous noise.

        Raises:
            ValueError: if a concept is unknown, a shape does not fit, or interventions are given without an adapter.
        """
        arguments = dict(
            prompt=prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **kwargs,
        )
        if self.context_module is None:
            if interventions or exogenous_noise is not None:
                self._require_context_module()
            output = super().__call__(
                ip_adapter_image=ip_adapter_image, ip_adapter_image_embeds=ip_adapter_image_embeds, **arguments
            )
            return ComposablePipelineOutput(output.images, output.nsfw_content_detected) if return_dict else output
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            raise ValueError(
                "A context adapter is loaded in the place of an IP-Adapter; unload it to pass its images."
            )
        num_prompts = _number_of_prompts(prompt, prompt_embeds)
        num_images = num_prompts * num_images_per_prompt
        mask = intervention_mask(interventions, self.concepts, num_prompts).repeat_interleave(
            num_images_per_prompt, dim=0
        )
        noise = self.prepare_exogenous_noise(num_images, generator, exogenous_noise)
        tokens = self._context_tokens(noise, mask)
        halves = 2 if guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None else 1
        observational = self._context_tokens(noise, torch.zeros_like(mask))
        with context_guidance(self.unet, observational, context_guidance_scale):
            output = super().__call__(ip_adapter_image_embeds=[torch.cat([tokens] * halves)], **arguments)
        if not return_dict:
            return (*output, noise)
        return ComposablePipelineOutput(output.images, output.nsfw_content_detected, noise)

    def to_json_string(self) -> str:
        """The config as it is saved, under the name of the class that stock diffusers loads it with."""
        config = json.loads(super().to_json_string()) | {"_class_name": StableDiffusionPipeline.__name__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def prepare_exogenous_noise(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        exogenous_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The concepts' noise (num_images, N, d_z): checked if given, else drawn without advancing `generator`.

        Raises:
            ValueError: if the given noise has another shape, or there are several generators but not one per image.
        """
        shape = (num_images, *self._require_context_module().noise_shape)
        if exogenous_noise is not None:
            if exogenous_noise.shape != shape:
                raise ValueError(
                    f"`exogenous_noise` has the shape {tuple(exogenous_noise.shape)}; {num_images} images of this"
                    f" adapter need {shape}."
                )
            return exogenous_noise
        if isinstance(generator, list):
            if len(generator) != num_images:
                raise ValueError(f"`generator` has {len(generator)} entries for {num_images} images.")
            return torch.cat([_draw_apart((1, *shape[1:]), one) for one in generator])
        if generator is None and self._execution_device.type != "cpu":
            return torch.randn(shape)  # the diffusion noise comes from the device's generator and advances that one
        return _draw_apart(shape, generator)

    def prepare_ip_adapter_image_embeds(
        self, ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
    ):
        if self.context_module is None:
            return super().prepare_ip_adapter_image_embeds(
                ip_adapter_image, ip_adapter_image_embeds, device, num_images_per_prompt, do_classifier_free_guidance
            )
        # context tokens come with a row per image already: unlike image prompts, each image has noise of its own
        return ip_adapter_image_embeds

    @torch.no_grad()
    def abduct(
        self, image: PipelineImageInput, factual: Interventions | Sequence[Interventions] = None
    ) -> torch.Tensor:
        """The exogenous noise (B, N, d_z) that explains images: the mean of the posterior.

        Args:
            image: one image or several, as PIL images, arrays or tensors.
            factual: the interventions under which they came about; none if they are observational.
        """
        noise = self._abduct(self._encode_images(image), factual)
        self.maybe_free_model_hooks()
        return noise

    @torch.no_grad()
    def counterfactual(
        self,
        image: PipelineImageInput,
        interventions: Interventions | Sequence[Interventions] = None,
        factual: Interventions | Sequence[Interventions] = None,
        prompt: str | list[str] = "",
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ComposablePipelineOutput | tuple:
        r"""What given images would have been under other interventions.

        Abduction: the posterior gives the concepts' exogenous noise, the inverted ODE the diffusion noise. Action: the
        mechanisms of `interventions` take the place of the factual ones. Prediction: both noises are run forward.

        Args:
            image: one image or several, as PIL images, arrays or tensors.
            interventions: the counterfactual context, as in `__call__`; equal to `factual`, it gives the images back.
            factual: the interventions under which the images came about.
            prompt: describes the images; one for all or one each.
            num_inference_steps: steps of the inversion and of the regeneration.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`ComposablePipelineOutput`].

        Raises:
            ValueError: if no adapter is loaded, a concept is unknown, or shapes do not fit.
        """
        latents = self._encode_images(image)
        noise = self._abduct(latents, factual)
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else prompt
        if len(prompts) != len(latents):
            raise ValueError(
                f"`prompt` has {len(prompts)} entries for {len(latents)} images; give one for all or each."
            )
        text = self.encode_prompt(prompts, latents.device, 1, do_classifier_free_guidance=False)[0]
        # the noise schedule alone, whichever scheduler samples: not every class builds all of them
        alphas = DDIMScheduler.from_config(self.scheduler.config).alphas_cumprod.to(latents.device)
        prediction_type = self.scheduler.config.prediction_type
        timesteps = evenly_spaced_timesteps(self.scheduler.config.num_train_timesteps, num_inference_steps)

        def model_under(context):
            tokens = self._context_tokens(noise, intervention_mask(context, self.concepts, len(latents)))

            def model(x, t):
                return self.unet(
                    x.to(text.dtype),
                    t,
                    encoder_hidden_states=text,
                    added_cond_kwargs={"image_embeds": [tokens]},
                    return_dict=False,
                )[0]

            return model

        # in single precision, or the steps back would not be undone by those forward
        diffusion_noise = invert(model_under(factual), latents.float(), alphas, timesteps, prediction_type)
        predicted = denoise(model_under(interventions), diffusion_noise, alphas, timesteps, prediction_type)
        images = predicted.to(latents.dtype)
        if output_type != "latent":
            decoded = self.vae.decode(images / self.vae.config.scaling_factor, return_dict=False)[0]
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, None, noise
        return ComposablePipelineOutput(images=images, nsfw_content_detected=None, exogenous_noise=noise)

    def _context_tokens(self, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        module = self._require_context_module()
        with weights_at_hand(module) as device:
            tokens = module(noise.to(device), mask.to(device))
        return tokens.to(self._execution_device)

    def _abduct(self, latents: torch.Tensor, factual: Interventions | Sequence[Interventions]) -> torch.Tensor:
        module = self._require_context_module()
        mask = intervention_mask(factual, self.concepts, len(latents))
        with weights_at_hand(module) as device:
            return module.abduct(latents.to(device), mask.to(device)).mean.to(self._execution_device)

    def _encode_images(self, image: PipelineImageInput) -> torch.Tensor:
        pixels = self.image_processor.preprocess(image).to(device=self._execution_device, dtype=self.vae.dtype)
        return retrieve_latents(self.vae.encode(pixels), sample_mode="argmax") * self.vae.config.scaling_factor


def _number_of_prompts(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
    if prompt_embeds is not None:
        return len(prompt_embeds)
    return len(prompt) if isinstance(prompt, list) else 1


def _draw_apart(shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    """Standard normal noise that depends on the generator's state but leaves it as it is.

    The copy of the generator only provides a seed: drawing the noise itself from it would repeat the very numbers
    that the diffusion noise is made of.
    """
    source = generator if generator is not None else torch.default_generator
    copy = torch.Generator(device=source.device)
    copy.set_state(source.get_state())
    seed = torch.randint(2**62, (), generator=copy, device=source.device).item()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
