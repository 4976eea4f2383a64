"""How well an adapter's nodes match the true factors of held-out quad images.

python benchmarks/concepts_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from methods.context_adapter import load_pipeline
from provenance import write_metrics

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    dci,
    mean_correlation_coefficient,
    mutual_information_gap,
    separated_attribute_predictability,
)
from diffusers_ctx.paths import expand_home, local_path


def infer_nodes(pipeline: ComposablePipeline, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise and values (n, nodes) of observational images (n, 64, 64, 3)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    noise = torch.cat([pipeline.infer_exogenous_noise(batch) for batch in pixels.split(100)])
    observational = torch.zeros(len(noise), len(pipeline.concepts), device=noise.device)
    with torch.no_grad():
        values = pipeline.context_module.concept_values(noise, observational)
    return noise.flatten(1).cpu().numpy(), values.flatten(1).cpu().numpy()


def disentanglement(codes: np.ndarray, factors: np.ndarray) -> dict[str, float]:
    """Of all nodes (n, d) as codes of factors (n, f); all are 1 at best."""
    parts = dci(codes, factors)
    return {
        "MCC": mean_correlation_coefficient(codes, factors),
        "disentanglement": parts.disentanglement,
        "completeness": parts.completeness,
        "informativeness": parts.informativeness,
        "MIG": mutual_information_gap(codes, factors),
        "SAP": separated_attribute_predictability(codes, factors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=expand_home, help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=600, help="Number of images.")
    parser.add_argument("--seed", type=int, default=quad.FIRST_HELD_OUT_SEED, help="Seed of the images.")
    parser.add_argument("--output", type=local_path, help="File for the metrics.")
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    sample = quad.generate(n=args.n, seed=args.seed)
    noise, values = infer_nodes(pipeline, sample.images)
    places, dim = [quad.FACTORS.index(name) for name in pipeline.concepts], pipeline.context_module.config.noise_dim
    factors, true_noise = sample.factors[:, places], sample.noise[:, places]
    metrics = {
        "correlations": {
            concept: float(abs(np.corrcoef(values[:, node * dim], factors[:, node])[0, 1]))
            for node, concept in enumerate(pipeline.concepts)
        },
        "values, of factors": disentanglement(values, factors),
        "noise, of the factors' noise": disentanglement(noise, true_noise),
    }
    for title, group in metrics.items():
        print(title)
        for name, metric in group.items():
            print(f"  {name:16s} {metric:.2f}")
    write_metrics(args.output, args.adapter, {"n": args.n, "seed": args.seed}, metrics)


if __name__ == "__main__":
    main()
