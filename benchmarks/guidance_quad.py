"""What classifier-free guidance and context guidance do to an adapter's samples on quad.

python benchmarks/guidance_quad.py runs/demo/adapter --n 200
"""

from __future__ import annotations

import argparse
from typing import Any

from measure import measure_combination
from methods.context_adapter import adapter_sampler, load_pipeline
from provenance import write_metrics

from diffusers_ctx import embedded_base
from diffusers_ctx.paths import local_path


SCALES = ((1.0, 1.0), (3.0, 1.0), (5.0, 1.0), (7.5, 1.0), (1.0, 2.0), (5.0, 2.0), (7.5, 2.0))
"""Pairs of `guidance_scale` and `context_guidance_scale`."""
_PRINTED = ("conformity", "shape_met", "swd", "floor", "debiased", "drift", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=local_path, help="Folder of the adapter.")
    parser.add_argument("--combinations", nargs="+", default=["obs", "quad4", "quad1+quad4", "quad1+quad3+size"])
    parser.add_argument("--n", type=int, default=200, help="Images per combination, at most 2,000.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--output", type=local_path, help="File for the metrics.")
    args = parser.parse_args()

    pipeline = load_pipeline(args.adapter, embedded_base())
    metrics: dict[str, dict[str, Any]] = {}
    for guidance, contrast in SCALES:
        scales = {"guidance_scale": guidance, "context_guidance_scale": contrast}
        sample = adapter_sampler(pipeline, args.num_inference_steps, match_prompt=None, **scales)
        found = metrics[f"{guidance:g}, {contrast:g}"] = {}
        for name in args.combinations:
            interventions = () if name == "obs" else tuple(name.split("+"))
            found[name] = measured = measure_combination(sample, interventions, args.n, dependent=True)
            line = " ".join(f"{key} {measured[key]:.3f}" for key in _PRINTED if measured.get(key) is not None)
            print(f"guidance {guidance:g}, of the context {contrast:g}, {name}: {line}", flush=True)
    options = {"n": args.n, "num_inference_steps": args.num_inference_steps}
    write_metrics(args.output, args.adapter, options, metrics)


if __name__ == "__main__":
    main()
