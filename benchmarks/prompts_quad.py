"""How many of an adapter's samples have the shape that their prompt names, with noise that matches it and without.

python benchmarks/prompts_quad.py runs/demo/adapter --n 500
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import AGAIN_SEED, REAL_SEED, SAMPLE_SEED, real_sample, shape_met
from methods.ours import adapter_sampler, load_pipeline

from diffusers_ctx import embedded_base
from diffusers_ctx.evaluation import read_attributes
from diffusers_ctx.evaluation.report import measure_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="Folder of the adapter.")
    parser.add_argument("--combinations", nargs="+", default=["obs", "size", "orientation", "quad1+quad4"])
    parser.add_argument("--n", type=int, default=500, help="Images per combination, at most 2,000.")
    parser.add_argument("--num_inference_steps", type=int, default=6)
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    for name in args.combinations:
        interventions = () if name == "obs" else tuple(name.split("+"))
        (real, _), (again, again_values) = (
            real_sample(interventions, args.n, seed, True) for seed in (REAL_SEED, AGAIN_SEED)
        )
        print(f"{name}: real images {shape_met(again_values, again.captions):.3f}", flush=True)
        for match_prompt in (False, True):
            sample = adapter_sampler(pipeline, args.num_inference_steps, match_prompt=match_prompt)
            images = sample(again.captions, interventions, SAMPLE_SEED)
            met = shape_met(read_attributes(images).values, again.captions)
            figures = measure_context(images, real.images, again.images)
            distances = " ".join(f"{key} {figures[key]:.4f}" for key in ("swd", "floor", "debiased"))
            print(f"  {'matching' if match_prompt else 'any'} noise {met:.3f}, {distances}", flush=True)


if __name__ == "__main__":
    main()
