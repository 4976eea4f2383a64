"""How well a small Stable Diffusion draws its pretraining images: quad images of all contexts, pooled.

python benchmarks/base_quad.py diffusers_ctx/assets/quad-base --output benchmarks/results/quad-base.json
python benchmarks/base_quad.py runs/longer --num_inference_steps 50
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from measure import REAL_B_SEED, REAL_SEED, SAMPLE_SEED, attribute_drift, shape_met
from methods.plain import load_plain, sample_prompts
from provenance import write_metrics

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import read_attributes
from diffusers_ctx.evaluation.report import measure_context
from diffusers_ctx.paths import expand_home, local_path


def pooled(images_per_context: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Held-out images (n, 64, 64, 3) of all contexts and their captions."""
    parts = [
        quad.generate(names, images_per_context, seed + place) for place, names in enumerate(quad.contexts().values())
    ]
    return np.concatenate([part.images for part in parts]), [caption for part in parts for caption in part.captions]


def sample_pooled(
    folder: str, images_per_context: int, num_inference_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """A base's samples, real images, and the other real ones whose captions the samples have; with these captions."""
    real, _ = pooled(images_per_context, REAL_SEED)
    real_b, captions = pooled(images_per_context, REAL_B_SEED + len(quad.contexts()))
    samples = sample_prompts(load_plain(folder), captions, SAMPLE_SEED, num_inference_steps)
    return samples, real, real_b, captions


def measure_base(folder: str, images_per_context: int, num_inference_steps: int) -> dict[str, Any]:
    """Distance to real images, share of samples with the prompt's shape, and drift of the attributes."""
    samples, real, real_b, captions = sample_pooled(folder, images_per_context, num_inference_steps)
    values, real_values, real_b_values = (read_attributes(images).values for images in (samples, real, real_b))
    metrics = measure_context(samples, real, real_b)
    for suffix, read in (("", values), ("_real", real_b_values)):
        metrics[f"shape_met{suffix}"] = shape_met(read, captions)
        metrics[f"drift{suffix}"] = attribute_drift(read, real_values)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=expand_home, help="Folder of the pipeline.")
    parser.add_argument("--images_per_context", type=int, default=100)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[6, 12, 25])
    parser.add_argument("--output", type=local_path, help="File for the metrics.")
    args = parser.parse_args()
    by_steps = {}
    for steps in args.num_inference_steps:
        by_steps[str(steps)] = metrics = measure_base(args.base, args.images_per_context, steps)
        print(json.dumps({"num_inference_steps": steps} | metrics), flush=True)
    options = {"images_per_context": args.images_per_context}
    write_metrics(args.output, args.base, options, {"num_inference_steps": by_steps})


if __name__ == "__main__":
    main()
