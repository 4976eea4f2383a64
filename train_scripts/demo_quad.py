"""The whole method on generated images: a picture of what the shipped adapter composes, then an adapter of your own.

    python train_scripts/demo_quad.py --output_dir runs/demo

Draws samples of the context adapter that comes with the library. Then writes quad images into one folder per context,
trains an adapter on the shipped Stable Diffusion with them, loads it as a user would, and compares its samples with
real images from held-out seeds, also under combinations of interventions that were never in the training data.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import sliced_wasserstein_distance
from diffusers_ctx.evaluation.grids import draw_grid, sample_rows
from diffusers_ctx.evaluation.images import to_uint8
from diffusers_ctx.paths import local_path
from diffusers_ctx.training import (
    ContextConfig,
    ContextTrainer,
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
    TrainingConfig,
)


CONTEXTS = (*quad.contexts().values(), ("quad1", "quad4"), ("quad2", "size"), ("quad1", "quad3", "orientation"))
COLUMNS = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=local_path, default=Path("runs/demo"))
    parser.add_argument("--concept_steps", type=int, default=700)
    parser.add_argument("--max_train_steps", type=int, default=250)
    parser.add_argument("--images_per_context", type=int, default=600)
    parser.add_argument(
        "--samples_per_context", type=int, default=100, help="Images that each distance is measured on."
    )
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(args: argparse.Namespace) -> Path:
    data = quad.write_folders(args.output_dir / "data", n=args.images_per_context, seed=args.seed)
    config = TrainingConfig(
        ModelConfig(embedded_base(), mode="lora", unfreeze_after=0.0),
        DataConfig(train_data_dir=str(data), concepts=list(quad.CONCEPTS), resolution=quad.RESOLUTION),
        ContextConfig(concept_steps=args.concept_steps),
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
    for checkpoint in adapter.glob("checkpoint-*"):  # the next demo is a new one
        shutil.rmtree(checkpoint)
    return adapter


def load(adapter: Path) -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def measure(pipeline: ComposablePipeline, interventions: tuple[str, ...], args: argparse.Namespace) -> list[float]:
    """Distances to real held-out images: of samples, and of as many other real images."""
    n, held_out = args.samples_per_context, quad.FIRST_HELD_OUT_SEED + args.seed
    real = quad.generate(interventions, n=n, seed=held_out)
    others = quad.generate(interventions, n=n, seed=held_out + 1)
    samples = pipeline(
        others.captions,
        interventions=list(interventions),
        generator=torch.Generator().manual_seed(held_out),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=1.0,
        match_prompt=False,  # captions say what an image showed before an intervention turned its shape
        output_type="np",
    ).images
    sets = (to_uint8(samples), others.images)
    return [sliced_wasserstein_distance(images, real.images) for images in sets]


def draw(pipeline: ComposablePipeline, picture: Path, args: argparse.Namespace) -> None:
    """A row of samples per context, the same noise down a column, and real held-out images beside it."""
    seed = quad.FIRST_HELD_OUT_SEED + args.seed
    prompts = quad.generate(n=COLUMNS, seed=seed).captions
    gap = np.full((1, quad.RESOLUTION, quad.RESOLUTION, 3), 255, dtype=np.uint8)
    rows, labels = [], []
    for interventions, samples in zip(
        CONTEXTS, sample_rows(pipeline, CONTEXTS, prompts, seed, args.num_inference_steps)
    ):
        real = quad.generate(interventions, n=COLUMNS, seed=seed).images
        rows.append(np.concatenate([samples, gap, real]))
        unseen = " (never seen together in training)" if len(interventions) > 1 else ""
        labels.append(f"{name_of(interventions)}{unseen}: {COLUMNS} samples, {COLUMNS} real images")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(rows, labels).save(picture)


def name_of(interventions: tuple[str, ...]) -> str:
    return f"do({', '.join(interventions)})" if interventions else "observational"


def main() -> None:
    args = parse_args()
    start = time.time()
    shipped = args.output_dir / "shipped.png"
    draw(load(Path(embedded_adapter("quad"))), shipped, args)
    print(f"Samples of the shipped adapter, after {time.time() - start:.0f} seconds: {shipped}", flush=True)

    adapter = train(args)
    pipeline = load(adapter)
    print(f"\nSliced Wasserstein distance to {args.samples_per_context} held-out images (of other real ones)")
    for interventions in tqdm(CONTEXTS, desc="Measuring", leave=False):
        distance, baseline = measure(pipeline, interventions, args)
        tqdm.write(f"  {name_of(interventions):30s} {distance:.3f} ({baseline:.3f})")
    picture = args.output_dir / "grid.png"
    draw(pipeline, picture, args)
    print(f"Adapter: {adapter}\nSamples: {picture}\nTook {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
