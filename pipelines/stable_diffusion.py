"""A Stable Diffusion pipeline that composes interventions on concepts."""

from __future__ import annotations

from diffusers import StableDiffusionPipeline

from .composition import CompositionMixin


class ComposablePipeline(CompositionMixin, StableDiffusionPipeline):
    r"""[`StableDiffusionPipeline`] with interventions on the concepts of a context adapter.

    Without an adapter it generates the same images as the plain pipeline. The exogenous noise is drawn from the
    generator without advancing it: with one seed, both pipelines start from the same diffusion noise.

    Examples:

    ```py
    >>> from diffusers_ctx import ComposablePipeline

    >>> pipe = ComposablePipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> pipe.load_context_adapter("user/weather-context")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    >>> pipe("a street in Lisbon", interventions={"night": 1.0, "snow": 0.4}).images[0]
    ```
    """
