"""Trains and measures context adapters and baselines on a test bed: same base, same images, same budget.

    python benchmarks/compare.py designs --base runs/base-pictures --images_per_context 32
    python benchmarks/compare.py quad-binary --images_per_context 100 --methods ours labels-only
    python benchmarks/compare.py designs --table

Each method's metrics, the log of its training and a picture go to files in benchmarks/results/BED, metrics as they are
measured: the same command, given again, continues after the last complete training and measurement. Weights, images,
latents and concepts are kept in --work_dir; after a change of the code, choose another one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container
from functools import cache
from pathlib import Path

import numpy as np
from bed_tables import render_tables
from beds.bed import Bed
from beds.registry import BEDS, create_bed
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from grids import COLUMNS, join_tiles, picture_of, save_samples
from measure_bed import REAL_SEED, measure_combination, measure_counterfactuals
from method_run import MethodRun, run_methods, setting_options
from methods.registry import create_bed_methods
from methods.setting import Editor, Method, Setting
from PIL import Image

from diffusers_ctx import embedded_base
from diffusers_ctx.data.decoding import square_crop
from diffusers_ctx.fingerprint import fingerprint
from diffusers_ctx.paths import local_path


RESULTS = Path(__file__).parent / "results"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=BEDS)
    parser.add_argument("--methods", nargs="+", choices=list(create_bed_methods()), help="By default all.")
    parser.add_argument("--base", type=local_path, help="Folder of the base to train on; by default quad's.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images_per_context", type=int, default=32)
    parser.add_argument("--train_steps", type=int, default=400, help="UNet steps after the concepts.")
    parser.add_argument("--concept_steps", type=int, help="Steps of learning the concepts; by default the library's.")
    parser.add_argument(
        "--baseline_steps", type=int, default=600, help="UNet steps of methods that learn no concepts."
    )
    parser.add_argument("--train_batch_size", type=int, default=64, help="Images of a UNet step.")
    parser.add_argument("--n", type=int, default=35, help="Half the samples of each combination.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="Of samples, not of counterfactuals.")
    parser.add_argument("--cache_dir", type=local_path, default=Path("runs/sources"), help="What beds are made from.")
    parser.add_argument("--work_dir", type=local_path, default=Path("runs/compare"))
    parser.add_argument("--results_dir", type=local_path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="Only print the tables of the results.")
    return parser.parse_args()


def measure(run: MethodRun, method: Method, setting: Setting, n: int) -> None:
    """Trains a method and measures what has not been measured."""
    bed, sample = setting.bed, run.sampler(method)
    for interventions in _missing(bed, run.results["contexts"]):
        metrics = measure_combination(bed, sample, interventions, n, setting.base)
        run.add_context(name_of(interventions), metrics)
        right, distance = metrics["all_right"], metrics["swd"]
        print(f"{run.name} {name_of(interventions)}: right {right:.2f}, distance {distance:.3f}", flush=True)
    picture = picture_of(run.file)
    if not picture.exists():
        captions = bed.unseen((), COLUMNS, REAL_SEED).captions
        save_samples(join_tiles([sample(captions, interventions, 0) for interventions in combinations(bed)]), picture)
    if setting.guidance_scale == 1 and hasattr(method, "load_editor"):
        measure_edits(run, method.load_editor, setting, n)


def measure_edits(run: MethodRun, load_editor: Callable[..., Editor], setting: Setting, n: int) -> None:
    """Measures the counterfactuals that have not been measured, of observational images."""
    bed = setting.bed
    missing = _missing(bed, {"obs": None, **run.results.get("counterfactuals", {})})
    picture = picture_of(run.file, "-counterfactuals")
    if not missing and picture.exists():
        return
    factual = bed.unseen((), n, REAL_SEED)
    images = [square_crop(Image.fromarray(image), setting.resolution) for image in factual.images]  # as in training
    edit = cache(load_editor(setting, run.folder)(np.stack([np.asarray(image) for image in images]), factual.captions))
    for interventions in missing:
        metrics = measure_counterfactuals(bed, edit, factual, interventions)
        run.add_counterfactuals(name_of(interventions), metrics)
        print(f"{run.name} {name_of(interventions)}: error of counterfactuals {metrics['error']:.3f}", flush=True)
    save_samples(join_tiles([edit(interventions)[:COLUMNS] for interventions in combinations(bed)]), picture)


def name_of(interventions: tuple[str, ...]) -> str:
    return "+".join(interventions) or "obs"


def _missing(bed: Bed, measured: Container[str]) -> list[tuple[str, ...]]:
    return [interventions for interventions in combinations(bed) if name_of(interventions) not in measured]


def draw_real(bed: Bed, resolution: int) -> Image.Image:
    """Real images of the combinations that methods draw, a row for each."""
    rows = [bed.unseen(interventions, COLUMNS, REAL_SEED).images for interventions in combinations(bed)]
    real = join_tiles(rows)
    return real.resize((real.width * resolution // bed.resolution, real.height * resolution // bed.resolution))


def combinations(bed: Bed) -> list[tuple[str, ...]]:
    """All that is measured: contexts, then held-out combinations."""
    return [*bed.contexts.values(), *bed.held_out]


def check_base(base: str, resolution: int) -> None:
    """Checks that LoRAs can learn on a base as the adapter does.

    Raises:
        ValueError: if it predicts something else than v, or draws at another resolution.
    """
    prediction = DDIMScheduler.load_config(base, subfolder="scheduler")["prediction_type"]
    levels = len(AutoencoderKL.load_config(base, subfolder="vae")["block_out_channels"])
    size = UNet2DConditionModel.load_config(base, subfolder="unet")["sample_size"] << levels - 1
    if prediction != "v_prediction" or size != resolution:
        raise ValueError(
            f"{base} predicts {prediction} at {size} pixels; baselines learn v-prediction at {resolution}: give such a"
            " base, as train_base.py makes it."
        )


_NOT_OPTIONS = ("methods", "base", "cache_dir", "work_dir", "results_dir", "table")


def main() -> None:
    args = parse_args()
    results_dir = args.results_dir / args.bed
    if args.table:
        print(render_tables(results_dir))
        return
    base = args.base or Path(embedded_base())
    bed = create_bed(args.bed, args.cache_dir)
    sampling = {"train_batch_size": args.train_batch_size, "guidance_scale": args.guidance_scale}
    setting = Setting(bed=bed, base=str(base), **sampling, **setting_options(args))
    check_base(setting.base, setting.resolution)
    methods = create_bed_methods()
    options = {key: value for key, value in vars(args).items() if key not in _NOT_OPTIONS}
    options["base"] = fingerprint(*sorted(base.rglob("*.safetensors")))  # its folder is elsewhere on every machine
    run_methods(
        args.methods or methods,
        setting,
        options,
        results_dir,
        lambda run: measure(run, methods[run.name], setting, args.n),
    )
    draw_real(setting.bed, setting.resolution).save(results_dir / "real.png")


if __name__ == "__main__":
    main()
