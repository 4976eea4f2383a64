"""How well a small Stable Diffusion draws what it was pretrained on: quad images of all contexts, pooled.

python benchmarks/base_quad.py diffusers_ctx/assets/quad-base
python benchmarks/base_quad.py runs/longer --n 700 --num_inference_steps 6 12 25 50
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from measure import AGAIN_SEED, REAL_SEED, attribute_drift
from methods.setting import device, in_batches

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import read_attributes
from diffusers_ctx.evaluation.report import measure_context


SAMPLE_SEED = 5


def pooled_sample(n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Held-out images (n, 64, 64, 3) and captions, n / 7 of each context."""
    samples = [
        quad.generate(names, n // 7, seed + 10 * number) for number, names in enumerate(quad.contexts().values())
    ]
    return np.concatenate([s.images for s in samples]), [caption for s in samples for caption in s.captions]


def shape_of(captions: list[str]) -> np.ndarray:
    """The shape that each caption names, as attributes have it: in [0, 1]."""
    return np.array([next(i for i, name in enumerate(quad.SHAPES) if name in caption) for caption in captions]) / 3


def measure_base(pipeline: StableDiffusionPipeline, n: int, num_inference_steps: int) -> dict[str, Any]:
    """Distance to real images, shape and laws of attributes, each beside that of other real images."""
    (real, _), (again, captions) = (pooled_sample(n, seed) for seed in (REAL_SEED, AGAIN_SEED))

    def sample_batch(batch: list[str], generator: torch.Generator) -> np.ndarray:
        return pipeline(
            batch,
            generator=generator,
            num_inference_steps=num_inference_steps,
            guidance_scale=1.0,
            output_type="np",
        ).images

    samples = in_batches(sample_batch, captions, SAMPLE_SEED)
    figures = measure_context(samples, real, again)
    values, real_values, again_values = (read_attributes(images).values for images in (samples, real, again))
    for name, read in (("", values), ("_real", again_values)):
        figures[f"shape_met{name}"] = float(
            (np.abs(read[:, quad.FACTORS.index("shape")] - shape_of(captions)) < 0.1).mean()
        )
        figures[f"drift{name}"] = attribute_drift(read, real_values)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="Folder of the pipeline.")
    parser.add_argument("--n", type=int, default=700, help="Images in all.")
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[6, 25])
    args = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=torch.float32).to(device())
    pipeline.set_progress_bar_config(disable=True)
    for steps in args.num_inference_steps:
        print(json.dumps({"steps": steps} | measure_base(pipeline, args.n, steps)), flush=True)


if __name__ == "__main__":
    main()
