"""How close an adapter's contexts, the held-out pairs and a few further combinations come to their laws on quad.

python benchmarks/compositions_quad.py runs/demo/adapter
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import conformity, edge_auroc, read_attributes
from diffusers_ctx.evaluation.report import measure_context


FURTHER = (("quad3", "quad4"), ("size", "orientation"), ("quad1", "quad2", "quad4"), ("quad1", "quad3", "size"))
BATCH_SIZE = 100


def sample(pipeline: ComposablePipeline, prompts: list[str], interventions: tuple[str, ...], steps: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    batches = [
        pipeline(
            prompts[start : start + BATCH_SIZE],
            interventions=list(interventions),
            generator=generator,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="np",
        ).images
        for start in range(0, len(prompts), BATCH_SIZE)
    ]
    return np.rint(np.concatenate(batches) * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="Folder of the adapter.")
    parser.add_argument("--n", type=int, default=500, help="Images per combination.")
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=3_000_000, help="Seed of the images; held out from 1,000,000 on.")
    args = parser.parse_args()

    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(args.adapter)
    pipeline.set_progress_bar_config(disable=True)
    print("combination: distance, floor, debiased; conformity of intervened attributes, of real images")
    for interventions in [*quad.contexts().values(), *quad.HELD_OUT_PAIRS, *FURTHER]:
        real, again = (quad.generate(interventions, args.n, seed) for seed in (args.seed, args.seed + 1))
        samples = sample(pipeline, again.captions, interventions, args.num_inference_steps)
        figures = measure_context(samples, real.images, again.images)
        distances = " ".join(f"{figures[name]:.3f}" for name in ("swd", "floor", "debiased"))
        line = f"{'+'.join(interventions) or 'obs'}: {distances}"
        # an orientation read modulo its shape's period fills its whole range under any law
        queried = [quad.FACTORS.index(name) for name in interventions if name != "orientation"]
        if queried:
            law, others, read = (read_attributes(x).values[:, queried] for x in (real.images, again.images, samples))
            line += f"; {conformity(read, law).joint:.3f} {conformity(others, law).joint:.3f}"
        print(line, flush=True)
    true_edges = np.array([[(cause, effect) in quad.EDGES for cause in quad.CONCEPTS] for effect in quad.CONCEPTS])
    strengths = pipeline.context_module.causal.strengths().numpy()
    count = len(quad.CONCEPTS)
    print(f"AUROC of edges among the concepts {edge_auroc(strengths[:count, :count], true_edges):.3f}")


if __name__ == "__main__":
    main()
