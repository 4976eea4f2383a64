"""Stable Diffusion as it is, which bases are measured by and baselines start from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from .setting import device, in_batches


def load_plain(folder: str) -> StableDiffusionPipeline:
    """The pipeline of a folder, in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_prompts(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """One image of each prompt: (n, R, R, 3) uint8."""
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "output_type": "np"}

    def sample_batch(batch: list[str], generator: torch.Generator) -> np.ndarray:
        return pipeline(batch, generator=generator, **options).images

    return in_batches(sample_batch, prompts, seed)
