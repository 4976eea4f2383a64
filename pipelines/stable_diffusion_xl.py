"""A Stable Diffusion XL pipeline that composes interventions on concepts."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

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
