"""A Stable Diffusion pipeline that composes interventions on concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput

from diffusers_ctx.context import Interventions

from .composition import ComposablePipelineOutput, CompositionMixin


class ComposablePipeline(CompositionMixin, StableDiffusionPipeline):
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

    plain_class = StableDiffusionPipeline

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
        match_prompt: bool = False,
        **kwargs,
    ) -> ComposablePipelineOutput | tuple:
        r"""Generates images under interventions.

        Takes every argument of [`StableDiffusionPipeline.__call__`], and those below. By default, `height` and `width`
        are what the adapter was trained at, or those of `latents`.

        Args:
            interventions: concepts to intervene on: a list of names, a mapping from names to strengths in [0, 1], or
                one of these per prompt. None is the observational context.
            exogenous_noise (`torch.Tensor` of shape (number of images, N, d_z), *optional*): the concepts' noise,
                drawn from `generator`, or from torch's own on the CPU, if not given.
            context_guidance_scale (`float`): exaggerates (above 1) or weakens (below 1) the contrast between the
                interventions and the observational context; 1 costs nothing.
            match_prompt (`bool`): draws noise that goes with the prompt, where it is drawn here: what an image without
                interventions would be described by. By default noise is drawn without a look at the prompt, and where
                the two contradict one another, either may win.

        Returns:
            [`ComposablePipelineOutput`], or if `return_dict` is `False` a tuple of images, safety flags and, with a
            context adapter, the exogenous noise.

        Raises:
            ValueError: if a concept is unknown, a shape does not fit, interventions are given without an adapter, or
                the prompt is to be matched by noise that is given, or by an adapter that did not learn from captions.
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
            ip_adapter_image=ip_adapter_image,
            ip_adapter_image_embeds=ip_adapter_image_embeds,
            output_type=output_type,
            return_dict=return_dict,
            cross_attention_kwargs=cross_attention_kwargs,
            guidance_rescale=guidance_rescale,
            clip_skip=clip_skip,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            **kwargs,
        )
        return self._generate(
            super().__call__, arguments, interventions, exogenous_noise, context_guidance_scale, match_prompt
        )

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        text, _ = self.encode_prompt(captions, self._execution_device, 1, do_classifier_free_guidance=False)
        return {"text": text}

    def unet_conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": encoded["text"]}
