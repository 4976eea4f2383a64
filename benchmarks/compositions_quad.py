"""Distances of an adapter's contexts and compositions on quad to their distributions, on as many images as you like.

    python benchmarks/compositions_quad.py runs/demo/adapter --n 500
    python benchmarks/compositions_quad.py runs/mine --combinations quad3+quad4 quad1+quad3+size

By default the combinations of `quad.py`: contexts, held-out pairs and three triples. Metrics go to
--output as they are measured: the same command, given again, continues where it stopped.
"""

from __future__ import annotations

import argparse
import json

from measure import COMBINATIONS, measure_combination, measure_graph, measure_interference
from methods.context_adapter import adapter_sampler, load_pipeline
from provenance import made_with

from diffusers_ctx import embedded_base
from diffusers_ctx.paths import local_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=local_path, help="Folder of the adapter.")
    parser.add_argument(
        "--output", type=local_path, help="File of the metrics; by default compositions.json beside it."
    )
    parser.add_argument("--combinations", nargs="+", default=list(COMBINATIONS), help="Such as obs or quad1+quad4.")
    parser.add_argument("--independent", action="store_true", help="The variant without edges between the factors.")
    parser.add_argument("--n", type=int, default=500, help="Images per combination.")
    parser.add_argument("--num_inference_steps", type=int, default=6)
    args = parser.parse_args()

    file = args.output or args.adapter / "compositions.json"
    options = {"n": args.n, "num_inference_steps": args.num_inference_steps, "independent": args.independent}
    now = made_with(args.adapter, options)
    results = json.loads(file.read_text()) if file.exists() else now | {"contexts": {}}
    if any(results.get(key) != now[key] for key in ("adapter", "options")):
        raise ValueError(
            f"{file} has metrics of the adapter {results.get('adapter')} with {results['options']}, and this one is"
            f" {now['adapter']} with {options}; give another --output, or remove that file."
        )
    results |= now
    pipeline = load_pipeline(args.adapter, embedded_base())
    sample = adapter_sampler(pipeline, args.num_inference_steps)

    def keep() -> None:
        file.write_text(json.dumps(results, indent=1) + "\n")

    for name in args.combinations:
        if name not in results["contexts"]:
            interventions = () if name == "obs" else tuple(name.split("+"))
            metrics = measure_combination(sample, interventions, args.n, not args.independent)
            results["contexts"][name] = metrics | {"commit": now["commit"]}
            keep()
        metrics = results["contexts"][name]
        keys = ("swd", "floor", "debiased", "drift", "drift_real")
        line = " ".join(f"{key} {metrics[key]:.4f}" for key in keys if metrics[key] is not None)
        if "conformity" in metrics:
            line += f" conformity {metrics['conformity']:.3f}, of real images {metrics['conformity_real']:.3f}"
        print(f"{name}: {line}", flush=True)
    if "interference" not in results:
        results["interference"] = measure_interference(sample, not args.independent)
        if not args.independent:
            results["graph"] = measure_graph(pipeline.context_module)
        keep()
    if "graph" in results:
        print(f"AUROC of edges among the concepts {results['graph']['auroc']:.3f}")


if __name__ == "__main__":
    main()
