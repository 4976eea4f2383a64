"""Share of an adapter's samples with the shape that the prompt names, with noise that matches the prompt and without.

python benchmarks/prompts_quad.py runs/demo/adapter --n 500
"""

from __future__ import annotations

import argparse
from typing import Any

from measure import measure_combination
from methods.context_adapter import adapter_sampler, load_pipeline
from provenance import write_metrics

from diffusers_ctx import embedded_base
from diffusers_ctx.paths import local_path


_PRINTED = ("shape_met", "shape_met_real", "swd", "floor", "debiased", "drift", "drift_real")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=local_path, help="Folder of the adapter.")
    parser.add_argument("--combinations", nargs="+", default=["obs", "size", "orientation", "quad1+quad4"])
    parser.add_argument("--n", type=int, default=500, help="Images per combination, at most 2,000.")
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--output", type=local_path, help="File for the metrics.")
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    samplers = {
        noise: adapter_sampler(pipeline, args.num_inference_steps, match_prompt=noise == "matching")
        for noise in ("any", "matching")
    }
    metrics: dict[str, dict[str, Any]] = {}
    for name in args.combinations:
        metrics[name] = {}
        interventions = () if name == "obs" else tuple(name.split("+"))
        for noise, sample in samplers.items():
            found = metrics[name][noise] = measure_combination(sample, interventions, args.n, dependent=True)
            print(f"{name}, {noise} noise: {' '.join(f'{key} {found[key]:.4f}' for key in _PRINTED)}", flush=True)
    options = {"n": args.n, "num_inference_steps": args.num_inference_steps}
    write_metrics(args.output, args.adapter, options, metrics)


if __name__ == "__main__":
    main()
