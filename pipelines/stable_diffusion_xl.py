"""Pipelines of Stable Diffusion XL that compose interventions on concepts."""

from __future__ import annotations

from diffusers import (
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from .composition import CompositionMixin


class ComposableXLPipeline(CompositionMixin, StableDiffusionXLPipeline):
    r"""[`StableDiffusionXLPipeline`] with interventions on the concepts of a context adapter, like
    [`ComposablePipeline`].

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableXLPipeline

    >>> pipe = ComposableXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
    >>> pipe.load_context_adapter("user/weather-context-xl")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    ```
    """


class ComposableXLImg2ImgPipeline(CompositionMixin, StableDiffusionXLImg2ImgPipeline):
    r"""[`StableDiffusionXLImg2ImgPipeline`] with interventions, like [`ComposableImg2ImgPipeline`]."""


class ComposableXLInpaintPipeline(CompositionMixin, StableDiffusionXLInpaintPipeline):
    r"""[`StableDiffusionXLInpaintPipeline`] with interventions, like [`ComposableInpaintPipeline`]."""


class ComposableXLControlNetPipeline(CompositionMixin, StableDiffusionXLControlNetPipeline):
    r"""[`StableDiffusionXLControlNetPipeline`] with interventions, like [`ComposableControlNetPipeline`]."""


class ComposableXLControlNetImg2ImgPipeline(CompositionMixin, StableDiffusionXLControlNetImg2ImgPipeline):
    r"""[`StableDiffusionXLControlNetImg2ImgPipeline`] with interventions, like [`ComposableControlNetPipeline`]."""


class ComposableXLControlNetInpaintPipeline(CompositionMixin, StableDiffusionXLControlNetInpaintPipeline):
    r"""[`StableDiffusionXLControlNetInpaintPipeline`] with interventions, like [`ComposableControlNetPipeline`]."""
