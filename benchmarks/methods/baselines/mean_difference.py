"""What a concept changes in the mean of the latents, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from diffusers_ctx.evaluation.images import to_uint8

from ..predicting import decode, encode
from ..setting import Edit, Editor, Sampler, Setting, in_batches
from .lora import load_base


@dataclass(frozen=True)
class MeanDifference:
    """Moves latents by the difference of a context's mean to the observational one, summed over interventions.

    Samples are the base's, which knows all contexts pooled; the method is there for counterfactuals.
    """

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        """There is nothing to learn."""

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_base(setting)
        steps, guidance = setting.num_inference_steps, setting.guidance_scale
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            def sample_batch(batch: list[str], generator: torch.Generator) -> np.ndarray:
                latents = pipeline(batch, generator=generator, **options).images
                return decode(pipeline, latents + self._difference(setting, interventions).to(latents))

            return in_batches(sample_batch, captions, seed)

        return sample

    def load_editor(self, setting: Setting, folder: Path) -> Editor:
        pipeline = load_base(setting)

        def editor(images: np.ndarray, captions: Sequence[str]) -> Edit:
            latents = encode(pipeline, images)
            return lambda names: to_uint8(decode(pipeline, latents + self._difference(setting, names).to(latents)))

        return editor

    def _difference(self, setting: Setting, interventions: Sequence[str]) -> torch.Tensor:
        """The sum (C, h, w) of what interventions change."""
        latents = setting.latents()

        def mean(context: str) -> torch.Tensor:
            return latents.mean[0, [row for row, name in enumerate(latents.contexts) if name == context]].mean(0)

        return sum((mean(name) - mean("obs") for name in interventions), torch.zeros_like(latents.mean[0, 0]))
