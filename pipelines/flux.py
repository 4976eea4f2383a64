"""Pipeline of FLUX.1 that composes interventions on concepts."""

from __future__ import annotations

from diffusers import FluxPipeline

from .composition import CompositionMixin


class ComposableFluxPipeline(CompositionMixin, FluxPipeline):
    r"""[`FluxPipeline`] with interventions on the concepts of a context adapter, like [`ComposablePipeline`].

    As in the plain pipeline, `latents` and those of callbacks are packed (B, L, 4 C), and `true_cfg_scale` guides away
    from a `negative_prompt`, while `guidance_scale` is what a distilled model is told.

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableFluxPipeline

    >>> pipe = ComposableFluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
    >>> pipe.load_context_adapter("user/weather-context-flux")
    >>> pipe("a street in Lisbon", interventions=["night", "snow"]).images[0]
    ```
    """
