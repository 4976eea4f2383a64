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
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grids import COLUMNS, DRAWN, join_tiles
from measure import COMBINATIONS, measure_combination, measure_graph, measure_interference
from methods.context_adapter import ContextAdapter, load_pipeline
from methods.registry import create_methods
from methods.setting import Method, Sampler, Setting
from PIL import Image
from provenance import commit, machine
from tables import render_tables
from training_logs import write_log

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


class MethodRun:
    """Trains and measures one method; its metrics are on disk.

    Raises:
        ValueError: if the file has metrics of other options.
    """

    def __init__(self, name: str, setting: Setting, args: argparse.Namespace):
        self.name, self.setting, self.n = name, setting, args.n
        budget = f"steps{setting.train_steps}"
        self.file = args.results_dir / f"{setting.name}-{budget}" / f"{name}.json"
        self.folder = args.work_dir / f"{setting.name}-{budget}" / name
        options = {key: value for key, value in vars(args).items() if key not in _NOT_OPTIONS}
        self.results: dict[str, Any] = {"method": name, "options": options, "contexts": {}}
        if self.file.exists():
            self.results = json.loads(self.file.read_text())
            if self.results["options"] != options:
                raise ValueError(
                    f"{self.file} was measured with {self.results['options']}; give the same options, or another"
                    " --results_dir."
                )

    def run(self, method: Method) -> None:
        self._check_work_dir()
        if "seconds" not in self.results:
            self.setting.latents()  # encoded once for all methods: not a part of this one's time
            start = time.monotonic()
            try:
                method.train(self.setting, self.folder)
            finally:
                spent = self.results.get("spent", 0.0) + time.monotonic() - start
                self._add(spent=spent)
            self._add(seconds=spent, unet_steps=method.steps(self.setting), commit=commit(), machine=machine())
        log = self.file.with_suffix(".csv")
        if not log.exists():
            write_log(self.folder, log)
        sample = method.load(self.setting, self.folder)
        measured = {"commit": commit()}
        for name, interventions in COMBINATIONS.items():
            if name not in self.results["contexts"]:
                metrics = measure_combination(sample, interventions, self.n, self.setting.dependent)
                self.results["contexts"][name] = metrics | measured
                self._add()
                print(f"{self.name} {name}: {metrics['swd']:.3f}, debiased {metrics['debiased']:.3f}", flush=True)
        if "interference" not in self.results:
            self._add(interference=measure_interference(sample, self.setting.dependent))
        learns_graph = isinstance(method, ContextAdapter) and method.learns_graph and self.setting.dependent
        if learns_graph and "graph" not in self.results:
            pipeline = load_pipeline(self.folder, self.setting.base, full=method.mode == "full")
            self._add(graph=measure_graph(pipeline.context_module))
        picture = self.file.with_suffix(".png")
        if not picture.exists():
            self._draw(sample).save(picture)

    def _check_work_dir(self) -> None:
        """Weights in the working folder must be of a training with the same options."""
        file = self.folder.parent / "options.json"
        training = {key: value for key, value in self.results["options"].items() if key not in _OF_SAMPLING}
        if file.exists() and json.loads(file.read_text()) != training:
            raise ValueError(
                f"{self.folder.parent} has weights that were trained with {file.read_text()}; give the same options,"
                " or another --work_dir."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(training) + "\n")

    def _add(self, **results: Any) -> None:
        self.results.update(results)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        unfinished.replace(self.file)

    def _draw(self, sample: Sampler) -> Image.Image:
        """A row per combination, the same caption and noise down a column."""
        captions = quad.generate(n=COLUMNS, seed=quad.FIRST_HELD_OUT_SEED, dependent=self.setting.dependent).captions
        return join_tiles([sample(captions, COMBINATIONS[name], 0) for name in DRAWN])


_OF_SAMPLING = ("n", "num_inference_steps")
_NOT_OPTIONS = ("methods", "work_dir", "results_dir", "table")


def main() -> None:
    args = parse_args()
    if args.table:
        print(render_tables(args.results_dir))
        return
    setting = Setting(
        dependent=not args.independent,
        seed=args.seed,
        images_per_context=args.images_per_context,
        train_steps=args.train_steps,
        concept_steps=args.concept_steps,
        baseline_steps=args.baseline_steps,
        num_inference_steps=args.num_inference_steps,
        work_dir=args.work_dir,
    )
    methods = create_methods(setting.dependent)
    for name in args.methods or methods:
        torch.manual_seed(args.seed)
        np.random.seed(args.seed)
        MethodRun(name, setting, args).run(methods[name])


if __name__ == "__main__":
    main()
