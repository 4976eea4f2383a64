"""Pipelines of Stable Diffusion 1 and 2 that compose interventions on concepts."""

from __future__ import annotations

from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

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


class ComposableImg2ImgPipeline(CompositionMixin, StableDiffusionImg2ImgPipeline):
    r"""[`StableDiffusionImg2ImgPipeline`] with interventions on the concepts of a context adapter.

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableImg2ImgPipeline

    >>> image_to_image = ComposableImg2ImgPipeline.from_pipe(pipe)  # with the adapter of `pipe`
    >>> image_to_image("a street in Lisbon", image=photo, strength=0.6, interventions=["night", "snow"]).images[0]
    ```
    """


class ComposableInpaintPipeline(CompositionMixin, StableDiffusionInpaintPipeline):
    r"""[`StableDiffusionInpaintPipeline`] with interventions on the concepts of a context adapter.

    It takes the UNet that the adapter was trained on, and not one of nine channels that was trained to inpaint.

    Examples:

    ```py
    >>> from diffusers_ctx import ComposableInpaintPipeline

    >>> inpaint = ComposableInpaintPipeline.from_pipe(pipe)  # with the adapter of `pipe`
    >>> inpaint("a street in Lisbon", image=photo, mask_image=mask, interventions=["snow"]).images[0]
    ```
    """


class ComposableControlNetPipeline(CompositionMixin, StableDiffusionControlNetPipeline):
    r"""[`StableDiffusionControlNetPipeline`] with interventions on the concepts of a context adapter.

    The ControlNet gets the text alone, and no context tokens, whichever way these are injected into the UNet: it was
    trained without them, and what it makes of its image is then the same in every context. `counterfactual` goes
    without the ControlNet.

    Examples:

    ```py
    >>> from diffusers import ControlNetModel
    >>> from diffusers_ctx import ComposableControlNetPipeline

    >>> controlnet = ControlNetModel.from_pretrained("lllyasviel/sd-controlnet-canny")
    >>> control = ComposableControlNetPipeline.from_pipe(pipe, controlnet=controlnet)  # with the adapter of `pipe`
    >>> control("a street in Lisbon", image=edges, interventions=["night", "snow"]).images[0]
    ```
    """


class ComposableControlNetImg2ImgPipeline(CompositionMixin, StableDiffusionControlNetImg2ImgPipeline):
    r"""[`StableDiffusionControlNetImg2ImgPipeline`] with interventions, see [`ComposableControlNetPipeline`]."""


class ComposableControlNetInpaintPipeline(CompositionMixin, StableDiffusionControlNetInpaintPipeline):
    r"""[`StableDiffusionControlNetInpaintPipeline`] with interventions, see [`ComposableControlNetPipeline`]."""
