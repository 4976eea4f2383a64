"""The main job on the embedded default: quad images in contexts, a context adapter, compositions nobody saw.

    python train_scripts/demo_quad.py --output_dir runs/demo

Writes quad images into one folder per context, trains an adapter on the embedded Stable Diffusion with them, loads it
as a user would, and compares its samples, and those of the adapter that comes with the library, with real images from
held-out seeds.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import sliced_wasserstein_distance
from diffusers_ctx.evaluation.grids import draw_grid, sample_rows
from diffusers_ctx.training import ContextTrainer, TrainingConfig
from diffusers_ctx.training.config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig
from diffusers_ctx.training.run.checkpoints import list_checkpoints


CONTEXTS = (*quad.contexts().values(), ("quad1", "quad4"), ("quad2", "size"), ("quad1", "quad3", "orientation"))
COLUMNS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--images_per_context", type=int, default=1000)
    parser.add_argument(
        "--samples_per_context", type=int, default=200, help="Images that each distance is measured on."
    )
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> Path:
    data = quad.write_folders(args.output_dir / "data", n=args.images_per_context, seed=args.seed)
    config = TrainingConfig(
        ModelConfig(embedded_base(), mode="lora", unfreeze_after=0.0),
        DataConfig(train_data_dir=str(data), concepts=list(quad.CONCEPTS), resolution=quad.RESOLUTION),
        ContextConfig(),
        OptimizationConfig(
            seed=args.seed,
            train_batch_size=64,
            max_train_steps=args.max_train_steps,
            learning_rate=2e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=50,
        ),
        OutputConfig(
            output_dir=str(args.output_dir / "adapter"),
            checkpointing_steps=args.max_train_steps,
            resume_from_checkpoint="latest",
        ),
    )
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    adapter = ContextTrainer(config, pipeline).train()
    for checkpoint in list_checkpoints(adapter):  # the next demo is a new one
        shutil.rmtree(checkpoint)
    return adapter


def load(adapter: Path) -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def measure(
    pipelines: Sequence[ComposablePipeline], interventions: tuple[str, ...], args: argparse.Namespace
) -> list[float]:
    """Distance of each one's samples to held-out images, and the floor: that between two sets of held-out images."""
    n, held_out = args.samples_per_context, quad.FIRST_HELD_OUT_SEED + args.seed
    real = quad.generate(interventions, n=n, seed=held_out)
    again = quad.generate(interventions, n=n, seed=held_out + 1)
    distances = []
    for pipeline in pipelines:
        generated = pipeline(
            again.captions,
            interventions=list(interventions),
            generator=torch.Generator().manual_seed(held_out),
            num_inference_steps=args.num_inference_steps,
            guidance_scale=1.0,
            output_type="np",
        ).images
        distances.append(sliced_wasserstein_distance(np.rint(generated * 255).astype(np.uint8), real.images))
    return [*distances, sliced_wasserstein_distance(again.images, real.images)]


def draw(pipelines: Sequence[ComposablePipeline], args: argparse.Namespace) -> Path:
    """A row of each one's samples per context, the same noise down a column, and beside it real held-out images."""
    seed = quad.FIRST_HELD_OUT_SEED + args.seed
    prompts = quad.generate(n=COLUMNS, seed=seed).captions
    samples = [sample_rows(pipeline, CONTEXTS, prompts, seed, args.num_inference_steps) for pipeline in pipelines]
    gap = np.full((1, quad.RESOLUTION, quad.RESOLUTION, 3), 255, dtype=np.uint8)
    rows, labels = [], []
    for interventions, own, shipped in zip(CONTEXTS, *samples):
        real = quad.generate(interventions, n=COLUMNS, seed=seed).images
        rows.append(np.concatenate([own, gap, shipped, gap, real]))
        name = f"do({', '.join(interventions)})" if interventions else "observational"
        unseen = ", never seen together in training" if len(interventions) > 1 else ""
        labels.append(f"{name}{unseen}: {COLUMNS} samples, {COLUMNS} of the shipped adapter, {COLUMNS} real images")
    picture = args.output_dir / "grid.png"
    draw_grid(rows, labels).save(picture)
    return picture


def main() -> None:
    args = parse_args()
    start = time.time()
    adapter = train(args)
    pipelines = [load(adapter), load(Path(embedded_adapter("quad")))]
    print(f"\nSliced Wasserstein distance to {args.samples_per_context} held-out images (floor: real to real)")
    for interventions in tqdm(CONTEXTS, desc="Measuring", leave=False):
        distance, shipped, floor = measure(pipelines, interventions, args)
        name = " + ".join(interventions) or "obs"
        tqdm.write(f"  {name:28s} {distance:.3f}   shipped adapter {shipped:.3f}   floor {floor:.3f}")
    print(f"Adapter: {adapter}\nPicture: {draw(pipelines, args)}\nTook {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
