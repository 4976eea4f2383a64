"""Draws the pictures of the benchmark's results.

python benchmarks/figures.py benchmarks/results/quad/dependent-seed0-images4000-steps1000 --output_dir docs/benchmark
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from grids import COLUMNS, DRAWN, join_tiles, picture_of, tiles
from matplotlib.figure import Figure
from PIL import Image
from tables import distances, summarize_method

from diffusers_ctx.data import quad
from diffusers_ctx.paths import local_path
from diffusers_ctx.plot import heat_maps, interference


_CURVE_SAMPLES = 500  # of each combination: distances at different numbers cannot be compared
_CURVE_RUNS = "quad/dependent-seed0-*/ours.json"
_REFERENCE_RUN = {"images_per_context": 4000, "train_steps": 1000}
_REFERENCE_SAMPLES = "quad-ours-seed0-n500.json"  # of its weights
_CURVES = {"train_steps": "UNet steps of batch 64", "images_per_context": "images per context"}


def draw_compositions(folder: Path, methods: list[str], dependent: bool) -> Figure:
    """Unseen combinations, one a column: real images on top, and below them the samples of every method."""
    combinations = [name for name in DRAWN if "+" in name]
    labels = ["real images, held out", *methods]
    figure = Figure(figsize=(4 * len(combinations) + 1.6, 0.53 * len(labels) + 0.3), layout="constrained")
    grid = figure.subplots(len(labels), len(combinations), squeeze=False)
    for column, name in zip(grid.T, combinations):
        real = quad.generate(name.split("+"), n=COLUMNS, seed=quad.FIRST_HELD_OUT_SEED, dependent=dependent)
        column[0].set_title(f"do({name.replace('+', ', ')})")
        drawn = [real.images, *(tiles(Image.open(picture_of(folder / f"{method}.json")), name) for method in methods)]
        for axes, images in zip(column, drawn):
            axes.imshow(join_tiles([images]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
    for axes, label in zip(grid[:, 0], labels):
        axes.set_ylabel(label, rotation=0, horizontalalignment="right", verticalalignment="center")
    return figure


def draw_errors(results: list[dict[str, Any]]) -> Figure:
    """Debiased distances of every method: single interventions, pairs and triples."""
    summaries = sorted(filter(None, map(summarize_method, results)), key=lambda row: row["pairs"], reverse=True)
    figure = Figure(figsize=(7, 0.6 + 0.45 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(summaries))
    for offset, (name, color) in enumerate({"singles": "C0", "pairs": "C1", "triples": "C2"}.items()):
        axes.barh(places - 0.27 * (offset - 1), [row[name] for row in summaries], 0.25, color=color, label=name)
    axes.set_yticks(places, [row["method"] for row in summaries])
    axes.set(xlabel="debiased sliced Wasserstein distance to held-out images")
    axes.legend()
    return figure


def draw_interference(results: list[dict[str, Any]]) -> Figure:
    """How far each intervention moves each attribute, beside the true change."""
    matrices = {"truth": results[0]["interference"]["true_matrix"]}
    matrices |= {row["method"]: row["interference"]["matrix"] for row in results}
    return interference(matrices, quad.CONCEPTS, quad.FACTORS)


def draw_graphs(results: list[dict[str, Any]]) -> Figure:
    """The strengths of learned edges, beside the weights of the true ones."""
    order = [quad.FACTORS.index(name) for name in quad.CONCEPTS]
    deviation = quad.observational_deviation()
    true = np.abs(quad.edge_matrix() * deviation / deviation[:, None])[order][:, order]
    matrices = {"truth": true.tolist()} | {
        row["method"]: row["graph"]["strengths"] for row in results if "graph" in row
    }
    return heat_maps(matrices, quad.CONCEPTS, quad.CONCEPTS, "cause", "effect", largest=1.2)


def draw_curves(results_dir: Path) -> Figure:
    """How `ours` depends on the UNet's steps and on the number of images, all else being equal."""
    runs = [json.loads(file.read_text()) for file in results_dir.glob(_CURVE_RUNS)]
    reference = json.loads((results_dir / _REFERENCE_SAMPLES).read_text())
    points = [(_REFERENCE_RUN, distances(reference["contexts"]))]
    complete = [run for run in runs if summarize_method(run) is not None and run["options"]["n"] == _CURVE_SAMPLES]
    points += [(run["options"], distances(run["contexts"])) for run in complete]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (option, label) in zip(figure.subplots(1, 2, sharey=True), _CURVES.items()):
        others = [(name, value) for name, value in _REFERENCE_RUN.items() if name != option]
        line = sorted(
            (options[option], found["singles"], found["pairs"], found["triples"])
            for options, found in points
            if all(options[name] == value for name, value in others)
        )
        places, *lines = zip(*line)
        for name, line in zip(("singles", "pairs", "triples"), lines):
            axes.plot(places, line, "o-", label=name)
        axes.set(xscale="log", xlabel=label)
        axes.set_xticks(places, [f"{place:,}" for place in places], minor=False)
        axes.minorticks_off()
    figure.axes[0].set_ylim(bottom=0)  # only now: it would keep the top as it is, and both axes share it
    figure.axes[0].set_ylabel(f"debiased distance, {_CURVE_SAMPLES} samples")
    figure.axes[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=local_path, help="Folder of one comparison's results.")
    parser.add_argument("--output_dir", type=local_path, default=Path("docs/benchmark"))
    parser.add_argument(
        "--methods", nargs="+", default=["ours", "prompt-lora", "lora-per-context"], help="In matrices."
    )
    parser.add_argument("--shipped", type=local_path, help="Results of the shipped adapter, for the matrices too.")
    parser.add_argument(
        "--curves", type=local_path, help="Folder of all results, with runs of other steps and images."
    )
    args = parser.parse_args()

    results = [json.loads(file.read_text()) for file in sorted(args.results.glob("*.json"))]
    results = [row for row in results if summarize_method(row) is not None]
    dependent = not results[0]["options"]["independent"]
    chosen = [row for name in args.methods for row in results if row["method"] == name]
    if args.shipped:
        chosen.insert(0, {"method": "shipped adapter"} | json.loads(args.shipped.read_text()))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    by_error = sorted(results, key=lambda row: summarize_method(row)["pairs"])
    draw_compositions(args.results, [row["method"] for row in by_error], dependent).savefig(
        args.output_dir / "compositions.png", dpi=128
    )
    draw_errors(results).savefig(args.output_dir / "errors.png")
    draw_interference(chosen).savefig(args.output_dir / "interference.png")
    if any("graph" in row for row in chosen):
        draw_graphs(chosen).savefig(args.output_dir / "graphs.png")
    if args.curves:
        draw_curves(args.curves).savefig(args.output_dir / "curves.png")


if __name__ == "__main__":
    main()
