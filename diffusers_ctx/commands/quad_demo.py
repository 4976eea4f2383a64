"""The whole method on images of quad: a picture of what the shipped adapter composes, then an adapter of one's own."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import quad
from ..embedded import embedded_adapter, embedded_base
from ..evaluation import sliced_wasserstein_distance
from ..evaluation.grids import sample_rows
from ..evaluation.images import to_uint8
from ..pipelines import ComposablePipeline
from ..plot import draw_grid
from ..plot.libraries import require
from ..training import (
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


@dataclass(frozen=True)
class QuadDemo:
    """Draws samples of the shipped adapter, then trains, draws and measures another one.

    Attributes:
        output_dir: folder for the images, the adapter and the pictures.
        concept_steps: steps in which the concepts are learned.
        max_train_steps: steps of the adapter.
        images_per_context: images to train on.
        samples_per_context: images that each distance is measured on.
        num_inference_steps: denoising steps.
        seed: of the training and its images; what is measured has other seeds.
    """

    output_dir: Path
    concept_steps: int
    max_train_steps: int
    images_per_context: int
    samples_per_context: int
    num_inference_steps: int
    seed: int

    def run(self) -> None:
        """Prints what it does, the distances and where files are."""
        require("ot")  # before minutes are spent: it measures distances
        start = time.time()
        shipped = self.output_dir / "shipped.png"
        self._draw(_load(Path(embedded_adapter("quad"))), shipped)
        print(f"Samples of the shipped adapter, after {time.time() - start:.0f} seconds: {shipped}", flush=True)

        adapter = self._train()
        pipeline = _load(adapter)
        print(f"\nSliced Wasserstein distance to {self.samples_per_context} held-out images (of other real ones)")
        for interventions in tqdm(CONTEXTS, desc="Measuring", leave=False):
            distance, baseline = self._measure(pipeline, interventions)
            tqdm.write(f"  {_name_of(interventions):30s} {distance:.3f} ({baseline:.3f})")
        picture = self.output_dir / "grid.png"
        self._draw(pipeline, picture)
        print(f"Adapter: {adapter}\nSamples: {picture}\nTook {(time.time() - start) / 60:.1f} minutes")

    def _train(self) -> Path:
        data = quad.write_folders(self.output_dir / "data", n=self.images_per_context, seed=self.seed)
        config = TrainingConfig(
            ModelConfig(embedded_base(), mode="lora", unfreeze_after=0.0),
            DataConfig(train_data_dir=str(data), concepts=list(quad.CONCEPTS), resolution=quad.RESOLUTION),
            ContextConfig(concept_steps=self.concept_steps),
            OptimizationConfig(
                seed=self.seed,
                train_batch_size=64,
                max_train_steps=self.max_train_steps,
                learning_rate=2e-3,
                lr_scheduler="cosine",
                lr_warmup_steps=50,
            ),
            OutputConfig(
                output_dir=str(self.output_dir / "adapter"),
                checkpointing_steps=self.max_train_steps,
                resume_from_checkpoint="latest",
            ),
        )
        pipeline = ComposablePipeline.from_pretrained(embedded_base())
        adapter = ContextTrainer(config, pipeline).train()
        for checkpoint in adapter.glob("checkpoint-*"):  # the next demo is a new one
            shutil.rmtree(checkpoint)
        return adapter

    def _measure(self, pipeline: ComposablePipeline, interventions: tuple[str, ...]) -> list[float]:
        """Distances to real held-out images: of samples, and of as many other real images."""
        n, held_out = self.samples_per_context, quad.FIRST_HELD_OUT_SEED + self.seed
        real = quad.generate(interventions, n=n, seed=held_out)
        others = quad.generate(interventions, n=n, seed=held_out + 1)
        samples = pipeline(
            others.captions,
            interventions=list(interventions),
            generator=torch.Generator().manual_seed(held_out),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=1.0,
            match_prompt=False,  # captions say what an image showed before an intervention turned its shape
            output_type="np",
        ).images
        sets = (to_uint8(samples), others.images)
        return [sliced_wasserstein_distance(images, real.images) for images in sets]

    def _draw(self, pipeline: ComposablePipeline, picture: Path) -> None:
        """A row of samples per context, the same noise down a column, and real held-out images beside it."""
        seed = quad.FIRST_HELD_OUT_SEED + self.seed
        prompts = quad.generate(n=COLUMNS, seed=seed).captions
        gap = np.full((1, quad.RESOLUTION, quad.RESOLUTION, 3), 255, dtype=np.uint8)
        rows, labels = [], []
        for interventions, samples in zip(
            CONTEXTS, sample_rows(pipeline, CONTEXTS, prompts, seed, self.num_inference_steps)
        ):
            real = quad.generate(interventions, n=COLUMNS, seed=seed).images
            rows.append(np.concatenate([samples, gap, real]))
            unseen = " (never seen together in training)" if len(interventions) > 1 else ""
            labels.append(f"{_name_of(interventions)}{unseen}: {COLUMNS} samples, {COLUMNS} real images")
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_grid(rows, labels).save(picture)


def _load(adapter: Path) -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(adapter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _name_of(interventions: tuple[str, ...]) -> str:
    return f"do({', '.join(interventions)})" if interventions else "observational"
