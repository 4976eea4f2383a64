"""Remedies for a base with Stable Diffusion 1.x's noise schedule and prediction of the noise.

    python benchmarks/epsilon_base.py
    python benchmarks/epsilon_base.py --table      # the tables of the results

Makes such a variant of the small base, and trains the same context adapter on it without and with each remedy. All
methods share images, concepts (which do not depend on the UNet) and steps. Metrics go to --results as they are
measured: the same command, given again, continues where it stopped. --work_dir keeps weights, images and latents.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from base_quad import sample_pooled
from grids import join_tiles, picture_of, save_samples
from measure import COMBINATIONS, REAL_B_SEED, REAL_SEED, SAMPLE_SEED
from methods.context_adapter import ContextAdapter, adapter_sampler, load_pipeline
from methods.quad_setting import QuadSetting
from methods.setting import Method, Sampler, Setting
from PIL import Image
from provenance import commit, machine

from diffusers_ctx import embedded_base
from diffusers_ctx.adapter import set_context_scheduler
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.report import measure_context
from diffusers_ctx.paths import local_path
from diffusers_ctx.training import TrainingConfig
from diffusers_ctx.training.config import ContextConfig


RESULTS = Path(__file__).parent / "results" / "epsilon_base.json"
MEASURED = ("obs", "quad4", "quad1", "quad1+quad4")
BASE_SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_base.py"
POOLED = 86  # images of each context
DRAWN = 4  # samples of each combination


@dataclass(frozen=True)
class Remedy(ContextAdapter):
    """A context adapter that is trained with further options.

    Attributes:
        model: options of `ModelConfig`.
        optimization: options of `OptimizationConfig`.
    """

    # features of the UNet would differ from base to base, and the concepts with them
    context: ContextConfig = field(default_factory=lambda: ContextConfig(posterior_encoder="vae"))
    model: dict[str, Any] = field(default_factory=dict)
    optimization: dict[str, Any] = field(default_factory=dict)

    def config(self, setting: Setting, folder: Path) -> TrainingConfig:
        config = super().config(setting, folder)
        return replace(
            config,
            model=replace(config.model, **self.model),
            optimization=replace(config.optimization, **self.optimization),
        )


@dataclass(frozen=True)
class TrailingSampling:
    """Has no training of its own: samples of another method that start at the last timestep.

    Attributes:
        trained: the other method.
    """

    trained: str

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        if not (folder.parent / self.trained).exists():
            raise FileNotFoundError(f"Run the method '{self.trained}' first.")

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder.parent / self.trained, setting.base)
        set_context_scheduler(pipeline, {"timestep_spacing": "trailing"})
        return adapter_sampler(pipeline, setting.num_inference_steps)


_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
METHODS: dict[str, Method] = {
    "epsilon": Remedy(),
    "v-prediction-lora": Remedy(model=_ZERO_SNR),
    # a UNet that is still frozen could not predict what is asked of it
    "v-prediction-full": Remedy("full", model=_ZERO_SNR | {"unfreeze_after": 0.0}),
    "noise-offset": Remedy(optimization={"noise_offset": 0.1}),
    "high-noise": Remedy(optimization={"timestep_sampling": "high_noise"}),
    "v-base": Remedy(),  # on the small base itself: what is lost by having to learn another prediction
    "epsilon-trailing": TrailingSampling("epsilon"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="Which ones.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base_steps", type=int, default=1500, help="Steps of batch 64 that make the variant.")
    parser.add_argument("--images_per_context", type=int, default=1000)
    parser.add_argument("--concept_steps", type=int, default=1000, help="Steps of learning the concepts.")
    parser.add_argument("--train_steps", type=int, default=400, help="UNet steps of batch 64 of each method.")
    parser.add_argument("--n", type=int, default=500, help="Samples of each combination.")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--work_dir", type=local_path, default=Path("runs/epsilon"))
    parser.add_argument("--results", type=local_path, default=RESULTS, help="File of the results.")
    parser.add_argument("--table", action="store_true", help="Only print the tables of the results.")
    return parser.parse_args()


class Results:
    """The results on disk.

    Raises:
        ValueError: if the file has results of other options.
    """

    def __init__(self, args: argparse.Namespace):
        self.file: Path = args.results
        options = {key: value for key, value in vars(args).items() if key not in _NOT_OPTIONS}
        self.content: dict[str, Any] = {"options": options, "bases": {}, "methods": {}}
        if self.file.exists():
            self.content = json.loads(self.file.read_text())
            if self.content["options"] != options:
                raise ValueError(
                    f"{self.file} was measured with {self.content['options']}; give the same options, or another"
                    " --results."
                )
        else:
            command = shlex.join(["python", *sys.argv])
            self.content |= {"command": command, "commit": commit(), "machine": machine()}

    def keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.file)


_NOT_OPTIONS = ("methods", "work_dir", "results", "table")


def make_base(folder: Path, steps: int, seed: int) -> None:
    """Teaches the small base to predict the noise."""
    if (folder / "model_index.json").exists():  # written last
        return
    options = {
        "output_dir": folder,
        "pretrained_model_name_or_path": embedded_base(),
        "prediction_type": "epsilon",
        "train_batch_size": 64,
        "max_train_steps": steps,
        "learning_rate": 6e-4,
        "seed": seed + 2,  # the small base's own images are those of seeds 0 and 1
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(BASE_SCRIPT), "unet", *flags], check=True)


def measure_base(folder: str, num_inference_steps: int) -> dict[str, Any]:
    """Metrics of plain samples, with captions of all contexts pooled."""
    samples, real, real_b, _ = sample_pooled(folder, POOLED, num_inference_steps)
    return measure_context(samples, real, real_b) | lightness(samples, real)


def lightness(images: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation, over images, of the mean pixel in [0, 1], beside those of real images."""
    metrics = {}
    for suffix, each in (("", images), ("_real", real)):
        means = each.mean(axis=(1, 2, 3)) / 255
        metrics |= {f"lightness{suffix}": float(means.mean()), f"lightness_deviation{suffix}": float(means.std())}
    return metrics


def run_method(name: str, setting: Setting, results: Results) -> None:
    """Trains, measures and draws, except for what is there."""
    folder = methods_folder(setting) / name
    row = results.content["methods"].setdefault(name, {"contexts": {}})
    method = METHODS[name]
    if "commit" not in row:
        method.train(setting, folder)
        row["commit"] = commit()
        results.keep()
    sample = method.load(setting, folder)
    for context in MEASURED:
        if context not in row["contexts"]:
            row["contexts"][context] = measure_samples(sample, COMBINATIONS[context], results.content["options"]["n"])
            results.keep()
        metrics = row["contexts"][context]
        print(f"{name} {context}: {metrics['swd']:.3f}, debiased {metrics['debiased']:.3f}", flush=True)
    picture = folder.with_suffix(".png")
    if not picture.exists():
        join_tiles([draw_samples(sample)]).save(picture)


def methods_folder(setting: Setting) -> Path:
    return setting.work_dir / f"{setting.name}-steps{setting.train_steps}"


def measure_samples(sample: Sampler, interventions: tuple[str, ...], n: int) -> dict[str, Any]:
    """What `measure_context` and `lightness` measure."""
    real, real_b = (quad.generate(interventions, n, seed) for seed in (REAL_SEED, REAL_B_SEED))
    images = sample(real_b.captions, interventions, SAMPLE_SEED)
    return measure_context(images, real.images, real_b.images) | lightness(images, real.images)


def draw_samples(sample: Sampler) -> np.ndarray:
    """Samples of each combination with the same captions and noise."""
    captions = quad.generate(n=DRAWN, seed=quad.FIRST_HELD_OUT_SEED).captions
    return np.concatenate([sample(captions, COMBINATIONS[context], 0) for context in MEASURED])


def join_pictures(folder: Path) -> Image.Image:
    """Real images, and below them the samples of each method that has been measured."""
    real = [quad.generate(COMBINATIONS[context], DRAWN, REAL_B_SEED).images for context in MEASURED]
    pictures = [np.asarray(Image.open(file)) for name in METHODS if (file := folder / f"{name}.png").exists()]
    return join_tiles([np.concatenate(real), *(picture[None] for picture in pictures)])


def render_tables(results: dict[str, Any]) -> str:
    """Distances, debiased and in brackets raw, and lightness, mean and standard deviation; in Markdown."""
    rows = {name: row["contexts"] for name, row in results["methods"].items() if set(row["contexts"]) == set(MEASURED)}
    distances: dict[str, list[str]] = {"real to real": []}
    lights: dict[str, list[str]] = {"real images": []}
    for name, row in rows.items():
        distances[name] = [f"{row[context]['debiased']:.3f} ({row[context]['swd']:.3f})" for context in MEASURED]
        distances["real to real"] = [f"({row[context]['floor']:.3f})" for context in MEASURED]
        for of, suffix in ((name, ""), ("real images", "_real")):
            keys = (f"lightness{suffix}", f"lightness_deviation{suffix}")
            lights[of] = [" ± ".join(f"{row[context][key]:.3f}" for key in keys) for context in MEASURED]
    return "\n\n".join(_table(cells) for cells in (distances, lights))


def _table(cells: dict[str, list[str]]) -> str:
    lines = [" | ".join(["| method", *MEASURED]) + " |", "|---" + "|---:" * len(MEASURED) + "|"]
    return "\n".join(lines + [" | ".join([f"| {name}", *row]) + " |" for name, row in cells.items()])


def main() -> None:
    args = parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    results = Results(args)
    if args.table:
        print(render_tables(results.content))
        return
    work_dir = args.work_dir / f"base-seed{args.seed}-steps{args.base_steps}"
    base = work_dir / "base"
    make_base(base, args.base_steps, args.seed)
    setting = QuadSetting(
        dependent=True,
        seed=args.seed,
        images_per_context=args.images_per_context,
        train_steps=args.train_steps,
        concept_steps=args.concept_steps,
        baseline_steps=0,
        num_inference_steps=args.num_inference_steps,
        work_dir=work_dir,
        base=str(base),
    )
    for name, folder in {"epsilon": str(base), "small base": embedded_base()}.items():
        if name not in results.content["bases"]:
            results.content["bases"][name] = measure_base(folder, args.num_inference_steps)
            results.keep()
            print(f"{name}, contexts pooled: {results.content['bases'][name]['swd']:.3f}", flush=True)
    setting.latents()  # encoded once for all methods: not a part of the first one's time
    for name in args.methods:
        run_method(name, replace(setting, base=embedded_base()) if name == "v-base" else setting, results)
    save_samples(join_pictures(methods_folder(setting)), picture_of(args.results))
    print(render_tables(results.content))


if __name__ == "__main__":
    main()
