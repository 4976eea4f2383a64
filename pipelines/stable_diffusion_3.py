"""Pipelines of Stable Diffusion 3 and 3.5 that compose interventions on concepts."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from .composition import CompositionMixin


class ComposableSD3Pipeline(CompositionMixin, StableDiffusion3Pipeline):
    r"""[`StableDiffusion3Pipeline`] with interventions on the concepts of a context adapter, like
    [`ComposablePipeline`].

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableSD3Pipeline

    >>> pipe = ComposableSD3Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    >>> pipe.load_context_adapter("user/weather-context-sd3")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    ```
    """
