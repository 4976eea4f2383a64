"""Trains and measures context adapters and baselines: same base, same images, same budget.

    python benchmarks/quad.py                      # every method, dependent variant, seed 0
    python benchmarks/quad.py --methods ours prompt-lora --seed 1
    python benchmarks/quad.py --table              # the tables of all results

Each method's metrics, the log of its training and a picture go to files in benchmarks/results/quad, metrics as they
are measured: the same command, given again, continues after the last complete training and measurement. Weights,
images, latents and concepts are kept in --work_dir; after a change of the code, choose another one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grids import COLUMNS, DRAWN, join_tiles, picture_of, save_samples
from measure import COMBINATIONS, measure_combination, measure_graph, measure_interference
from method_run import MethodRun, run_methods, setting_options
from methods.context_adapter import ContextAdapter, load_pipeline
from methods.quad_setting import QuadSetting
from methods.registry import create_methods
from methods.setting import Method, Sampler
from PIL import Image
from tables import render_tables

from diffusers_ctx.data import quad
from diffusers_ctx.paths import local_path


RESULTS = Path(__file__).parent / "results" / "quad"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(create_methods(True)), help="By default all.")
    parser.add_argument("--independent", action="store_true", help="The variant without edges between the factors.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images_per_context", type=int, default=4000)
    parser.add_argument("--train_steps", type=int, default=1000, help="UNet steps of batch 64 after the concepts.")
    parser.add_argument("--concept_steps", type=int, default=1500, help="Steps of learning the concepts.")
    parser.add_argument(
        "--baseline_steps", type=int, default=1500, help="UNet steps of methods that learn no concepts."
    )
    parser.add_argument("--n", type=int, default=1000, help="Samples of each combination.")
    parser.add_argument("--num_inference_steps", type=int, default=6)
    parser.add_argument("--work_dir", type=local_path, default=Path("runs/benchmark"))
    parser.add_argument("--results_dir", type=local_path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="Only print the tables of the results.")
    return parser.parse_args()


def measure(run: MethodRun, method: Method, setting: QuadSetting, n: int) -> None:
    """Trains a method and measures what has not been measured."""
    sample = run.sampler(method)
    for name, interventions in COMBINATIONS.items():
        if name not in run.results["contexts"]:
            metrics = measure_combination(sample, interventions, n, setting.dependent)
            run.add_context(name, metrics)
            print(f"{run.name} {name}: {metrics['swd']:.3f}, debiased {metrics['debiased']:.3f}", flush=True)
    if "interference" not in run.results:
        run.add(interference=measure_interference(sample, setting.dependent))
    learns_graph = isinstance(method, ContextAdapter) and method.learns_graph and setting.dependent
    if learns_graph and "graph" not in run.results:
        pipeline = load_pipeline(run.folder, setting.base, full=method.mode == "full")
        run.add(graph=measure_graph(pipeline.context_module))
    picture = picture_of(run.file)
    if not picture.exists():
        save_samples(draw(sample, setting), picture)


def draw(sample: Sampler, setting: QuadSetting) -> Image.Image:
    """A row per combination, the same caption and noise down a column."""
    captions = quad.generate(n=COLUMNS, seed=quad.FIRST_HELD_OUT_SEED, dependent=setting.dependent).captions
    return join_tiles([sample(captions, COMBINATIONS[name], 0) for name in DRAWN])


_NOT_OPTIONS = ("methods", "work_dir", "results_dir", "table")


def main() -> None:
    args = parse_args()
    if args.table:
        print(render_tables(args.results_dir))
        return
    setting = QuadSetting(dependent=not args.independent, **setting_options(args))
    methods = create_methods(setting.dependent)
    options = {key: value for key, value in vars(args).items() if key not in _NOT_OPTIONS}
    run_methods(
        args.methods or methods,
        setting,
        options,
        args.results_dir,
        lambda run: measure(run, methods[run.name], setting, args.n),
    )


if __name__ == "__main__":
    main()
