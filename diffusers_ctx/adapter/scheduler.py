"""The noise schedule of an adapter that was trained with another one than its base model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DDIMScheduler, PNDMScheduler

from .backbones import backbone_of_pipeline


def set_context_scheduler(pipeline: Any, options: dict[str, Any]) -> None:
    """Gives a pipeline the noise schedule of its adapter, until the adapter is unloaded.

    Args:
        pipeline: has a UNet with a context module attached, and a `scheduler`.
        options: what differs from the base model's schedule: `prediction_type`, `rescale_betas_zero_snr` or
            `timestep_spacing`. DDIM replaces a scheduler that lacks one of them, and PNDM, the default of Stable
            Diffusion 1.x, which supports fewer prediction types.

    Raises:
        ValueError: if no adapter is attached.
    """
    backbone = backbone_of_pipeline(pipeline)
    if not backbone.has_context_module:
        raise ValueError("No context adapter is loaded; call `load_context_adapter(...)` first.")
    kind = type(pipeline.scheduler)
    if kind is PNDMScheduler or not set(options) <= set(inspect.signature(kind.__init__).parameters):
        kind, options = DDIMScheduler, {"clip_sample": False} | options
    adapter = backbone.adapter
    adapter.plain_scheduler = adapter.plain_scheduler or pipeline.scheduler
    pipeline.scheduler = kind.from_config(adapter.plain_scheduler.config, **options)
    adapter.prediction_type = pipeline.scheduler.config.prediction_type


@contextmanager
def plain_scheduler(pipeline: Any) -> Iterator[None]:
    """While it is open, the pipeline has the scheduler that goes with its backbone when the adapter is off."""
    adapter, scheduler = backbone_of_pipeline(pipeline).adapter, pipeline.scheduler
    if adapter.plain_scheduler is not None and not adapter.trained_full:
        pipeline.scheduler = adapter.plain_scheduler
    try:
        yield
    finally:
        pipeline.scheduler = scheduler


def check_scheduler(pipeline: Any) -> None:
    """Checks that the pipeline's scheduler is for what its backbone predicts.

    Raises:
        RuntimeError: if the adapter has a noise schedule of its own, and another pipeline loaded it.
    """
    backbone = backbone_of_pipeline(pipeline)
    needed, found = backbone.adapter.prediction_type, pipeline.scheduler.config.get("prediction_type")
    if needed not in (None, found):
        raise RuntimeError(
            f"The context adapter was trained for {needed}, and this pipeline's scheduler is for {found}. A pipeline"
            f" that shares its {backbone.name} has loaded the adapter: make this one after that, with `from_pipe`, or"
            " give it that one's scheduler."
        )
