"""Pictures of samples: a row per context, a seed per column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..autoencoding import decode_latents
from .images import to_uint8


_LABEL_HEIGHT = 14


def sample_rows(
    pipeline: Any,
    contexts: Sequence[Sequence[str]],
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
            interventions=list(interventions),
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=resolution,
            width=resolution,
            output_type="latent",
        ).images
        decoded = decode_latents(pipeline.vae, latents)
        rows.append(to_uint8(pipeline.image_processor.postprocess(decoded, output_type="np")))
    return rows


def draw_grid(rows: Sequence[np.ndarray], labels: Sequence[str], scale: int = 1) -> Image.Image:
    """One picture of rows of images (n, H, W, 3) uint8, each under its label; `scale` enlarges pixels."""
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    columns = max(map(len, rows))
    grid = Image.new("RGB", (columns * width, len(rows) * (height + _LABEL_HEIGHT)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (images, label) in enumerate(zip(rows, labels)):
        top = index * (height + _LABEL_HEIGHT)
        draw.text((2, top + 1), label, fill="black")
        for column, image in enumerate(images):
            enlarged = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (column * width, top + _LABEL_HEIGHT))
    return grid
