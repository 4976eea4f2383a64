"""What all methods of one comparison share: base, images, budget and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from beds.bed import Bed
from diffusers import AutoencoderKL

from diffusers_ctx.data import context_mask, load_context_dataset
from diffusers_ctx.evaluation.images import to_uint8
from diffusers_ctx.training.encoding.images import ImageTransform
from diffusers_ctx.training.encoding.latents import ContextLatents, encode_images


BATCH_SIZE = 100  # images sampled at once
Sampler = Callable[[Sequence[str], Sequence[str], int], np.ndarray]
"""Captions (n), interventions and a seed to n images (n, 64, 64, 3) uint8; one seed, one noise in every context."""
Edit = Callable[[Sequence[str]], np.ndarray]
"""Interventions to what some images would have been under them, (n, R, R, 3) uint8."""
Editor = Callable[[np.ndarray, Sequence[str]], Edit]
"""Observational images (n, R, R, 3) uint8 and their captions to their edits."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One comparison.

    Attributes:
        bed: the images, and what is known of them.
        base: folder of the Stable Diffusion that is trained on; those of one `work_dir` have the same autoencoder.
        seed: seed of images, weights and batches.
        images_per_context: training images of each context.
        train_steps: UNet steps of methods that learn the concepts first.
        concept_steps: steps of learning the concepts; `None` for as many as the library takes by default.
        baseline_steps: UNet steps of methods that learn no concepts: more, so that they take about as long.
        num_inference_steps: denoising steps of all samples.
        work_dir: folder of images, latents and weights.
        train_batch_size: images of a UNet step.
        resolution: height and width at which images are learned and drawn, in pixels.
        guidance_scale: that of all samples; counterfactuals are made without guidance.
    """

    bed: Bed
    base: str
    seed: int
    images_per_context: int
    train_steps: int
    concept_steps: int | None
    baseline_steps: int
    num_inference_steps: int
    work_dir: Path
    train_batch_size: int = 64
    resolution: int = 64
    guidance_scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.bed.name}-seed{self.seed}-images{self.images_per_context}"

    @property
    def folder(self) -> Path:
        """Folder of what methods share."""
        return self.work_dir / self.name

    @property
    def data_dir(self) -> Path:
        """Folder of training images, which are written at the first call."""
        folder, done = self.folder / "data", self.folder / "data-written"
        if not done.exists():
            self.write_images(folder)
            done.touch()
        return folder

    def write_images(self, folder: Path) -> None:
        self.bed.write_folders(folder, self.images_per_context, self.seed)

    def latents(self) -> ContextLatents:
        """The training images' latents, which are encoded at the first call."""

        def encode() -> ContextLatents:
            concepts = list(self.bed.concepts)
            dataset = load_context_dataset(self.data_dir, concepts=concepts)
            vae = AutoencoderKL.from_pretrained(self.base, subfolder="vae", torch_dtype=torch.float32)
            mask = context_mask(list(dataset["context"]), concepts)
            transform = ImageTransform(self.resolution, center_crop=True, seed=0)
            return encode_images(vae.requires_grad_(False).to(device()), dataset, mask, transform)

        return self.shared("latents", encode)

    def shared(self, name: str, compute: Callable[[], Any]) -> Any:
        """What methods share under this name, computed at the first call and read from disk afterwards."""
        file = self.folder / f"{name}.pt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")
            torch.save(compute(), unfinished)
            unfinished.replace(file)
        return torch.load(file, weights_only=False)


class Method(Protocol):
    """A method that the benchmark compares.

    Those that make counterfactuals have a method `load_editor(setting, folder)`, which returns an [`Editor`].
    """

    def steps(self, setting: Setting) -> int | None:
        """UNet steps that `train` takes, those of several LoRAs together; `None` if time decides."""

    def train(self, setting: Setting, folder: Path) -> None:
        """Trains and saves to `folder`."""

    def load(self, setting: Setting, folder: Path) -> Sampler:
        """The sampler of what `train` saved."""


def device() -> torch.device:
    """A GPU if there is one and `ACCELERATE_USE_CPU` is not set, and the CPU otherwise."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device


def in_batches(
    sample: Callable[[list[str], torch.Generator], np.ndarray], captions: Sequence[str], seed: int
) -> np.ndarray:
    """Images (n, H, W, 3) uint8 of all captions, from a function that makes a batch of them in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    batches = [list(captions[start : start + BATCH_SIZE]) for start in range(0, len(captions), BATCH_SIZE)]
    return np.concatenate([to_uint8(sample(batch, generator)) for batch in batches])
