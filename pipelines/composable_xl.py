"""A Stable Diffusion XL pipeline that composes interventions on concepts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from diffusers_ctx.context import Interventions

from .composition import ComposablePipelineOutput, CompositionMixin


class ComposableXLPipeline(CompositionMixin, StableDiffusionXLPipeline):
    r"""[`StableDiffusionXLPipeline`] with interventions on the concepts of a context adapter, which works as in
    [`ComposablePipeline`].

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableXLPipeline

    >>> pipe = ComposableXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    >>> pipe.load_context_adapter("user/weather-context-xl")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    ```
    """

    plain_class = StableDiffusionXLPipeline

    @torch.no_grad()
    def __call__(
        self,
        *args,
        interventions: Interventions | Sequence[Interventions] = None,
        exogenous_noise: torch.Tensor | None = None,
        context_guidance_scale: float = 1.0,
        match_prompt: bool = False,
        **kwargs,
    ) -> ComposablePipelineOutput | tuple:
        r"""Generates images under interventions.

        Takes every argument of [`StableDiffusionXLPipeline.__call__`], and those of [`ComposablePipeline.__call__`]
        that are named here. By default, `height` and `width` are what the adapter was trained at, or those of
        `latents`.

        Raises:
            ValueError: as there.
        """
        bound = inspect.signature(super().__call__).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs")
        return self._generate(
            super().__call__, arguments, interventions, exogenous_noise, context_guidance_scale, match_prompt
        )

    def encode_captions(self, captions: list[str]) -> dict[str, torch.Tensor]:
        device = self._execution_device
        text, _, pooled, _ = self.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
        if self.config.force_zeros_for_empty_prompt:  # which is what guidance takes for no prompt
            told = torch.tensor([bool(caption) for caption in captions], dtype=text.dtype, device=device)
            text, pooled = text * told[:, None, None], pooled * told[:, None]
        return {"text": text, "pooled": pooled}

    def unet_conditions(self, encoded: dict[str, torch.Tensor], geometry: torch.Tensor) -> dict[str, Any]:
        text = encoded["text"]
        added = {"text_embeds": encoded["pooled"], "time_ids": geometry.to(text)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
