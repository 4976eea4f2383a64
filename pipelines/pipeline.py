"""Lets `DiffusionPipeline.from_pretrained(..., custom_pipeline=<this folder>)` find the class."""

from diffusers_ctx.pipelines import ComposablePipeline


__all__ = ["ComposablePipeline"]
