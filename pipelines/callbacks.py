"""Callbacks at the end of each step, where images have contexts of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


StepCallback = Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def callback_inputs(callback: StepCallback | None, names: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback is given: those of diffusers' own callbacks are fixed."""
    return callback.tensor_inputs if isinstance(callback, PipelineCallback | MultiPipelineCallbacks) else names


def keeping_images(callback: StepCallback, num_images: int) -> StepCallback:
    """The same callback, checked to leave the number of images as it is: their contexts could not follow.

    It may end or begin guidance, which halves or doubles the rows of the prompt.

    Raises:
        ValueError: when called, if the callback returns latents or prompt embeddings for another number of images.
    """

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict:
        returned = callback(pipeline, step, timestep, tensors) or {}
        latents, prompt = returned.get("latents"), returned.get("prompt_embeds")
        if latents is not None and len(latents) != num_images:
            raise ValueError(
                f"The callback returned latents of {len(latents)} images, and {num_images} are being made; each has"
                " its context, so their number must stay."
            )
        if prompt is not None and len(prompt) != (rows := num_images * _copies(pipeline)):
            raise ValueError(
                f"The callback returned {len(prompt)} rows of `prompt_embeds`, and {num_images} images need {rows}; to"
                " end guidance, return `prompt_embeds.chunk(2)[-1]`."
            )
        return returned

    return on_step_end


def _copies(pipeline: Any) -> int:
    """How many rows of the prompt each image has: FLUX calls its model for each half of guidance."""
    return 1 + getattr(pipeline, "do_classifier_free_guidance", False)
