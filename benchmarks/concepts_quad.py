"""How well the node of each concept of an adapter holds the true factor of held-out quad images: their correlations.

python benchmarks/concepts_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from methods.ours import load_pipeline

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=600, help="Number of images.")
    parser.add_argument("--seed", type=int, default=quad.FIRST_HELD_OUT_SEED, help="Seed of the images.")
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    sample = quad.generate(n=args.n, seed=args.seed)
    pixels = torch.from_numpy(sample.images).permute(0, 3, 1, 2) / 255
    noise = torch.cat([pipeline.abduct(batch) for batch in pixels.split(100)])
    observational = torch.zeros(args.n, len(pipeline.concepts), device=noise.device)
    with torch.no_grad():
        values = pipeline.context_module.concept_values(noise, observational).cpu()
    for node, concept in enumerate(pipeline.concepts):
        factor = sample.factors[:, quad.FACTORS.index(concept)]
        print(f"{concept:12s} {abs(np.corrcoef(values[:, node, 0], factor)[0, 1]):.2f}")


if __name__ == "__main__":
    main()
