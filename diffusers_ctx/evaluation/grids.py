"""Samples for a picture: a row per context, a seed per column; `plot.draw_grid` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..autoencoding import decode_latents, unpack_latents
from ..context import Interventions
from .images import to_uint8


def sample_rows(
    pipeline: Any,
    contexts: Sequence[Interventions],
    prompts: Sequence[str],
    seed: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 1.0,
    resolution: int | None = None,
) -> list[np.ndarray]:
    """Images (len(prompts), H, W, 3) uint8 for each context, with the same prompts and the same noise in every row.

    The noise fits the prompts if the adapter learned captions, as in any call.

    Args:
        pipeline: a pipeline with a context adapter.
        contexts: what each row intervenes on.
        prompts: one per column.
        seed: seed of the first column; the next ones count on from it.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        resolution: height and width; by default the pipeline's own.
    """
    rows = []
    for interventions in contexts:
        generators = [torch.Generator().manual_seed(seed + column) for column in range(len(prompts))]
        latents = pipeline(
            list(prompts),
            interventions=interventions,
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            output_type="latent",
        ).images
        if latents.ndim == 3:  # packed, of squares
            side = 2 * math.isqrt(latents.shape[1])
            latents = unpack_latents(latents, side, side)
        decoded = decode_latents(pipeline.vae, latents)
        rows.append(to_uint8(pipeline.image_processor.postprocess(decoded, output_type="np")))
    return rows
