"""Predictions of one model under single concepts, added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctx.autoencoding import decode_latents, native_resolution

from ..setting import Method, Sampler, Setting, device, in_batches


Prediction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Latents (B, C, h, w) and a timestep to what the UNet predicts."""
Predictor = Callable[[list[str], Sequence[str]], Prediction]
"""Captions (B) and interventions to the predictions under them."""


class Predicting(Method, Protocol):
    """A method whose predictions can be added up."""

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        """What `train` saved: a pipeline, and its predictions."""


@dataclass(frozen=True)
class ComposableDiffusion:
    """Adds up the change that each concept makes to the prediction of a method that knows the concepts one by one.

    Liu et al. 2022 (arXiv 2206.01714), equation 11, with the observational context as the unconditional one and
    weights of 1; a single concept is sampled as that method samples it.

    Attributes:
        source: name of the method.
        method: the method.
    """

    source: str
    method: Predicting

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        self.method.load_predictor(setting, folder.parent / self.source)  # which must be there

    def load(self, setting: Setting, folder: Path) -> Sampler:
        single = self.method.load(setting, folder.parent / self.source)
        pipeline, predictor = self.method.load_predictor(setting, folder.parent / self.source)

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            if len(interventions) < 2:
                return single(captions, interventions, seed)
            return in_batches(
                lambda batch, generator: compose(pipeline, predictor, setting, batch, interventions, generator),
                captions,
                seed,
            )

        return sample


@torch.no_grad()
def compose(
    pipeline: StableDiffusionPipeline,
    predictor: Predictor,
    setting: Setting,
    captions: list[str],
    interventions: Sequence[str],
    generator: torch.Generator,
) -> np.ndarray:
    """Images (n, H, W, 3) in [0, 1]: at each step, plain + Σ (concept - plain)."""
    scheduler, size = pipeline.scheduler, native_resolution(pipeline) // pipeline.vae_scale_factor
    plain, *concepts = (predictor(captions, names) for names in ([], *([name] for name in interventions)))
    noise = torch.randn(len(captions), pipeline.unet.config.in_channels, size, size, generator=generator)
    latents = noise.to(device()) * scheduler.init_noise_sigma
    scheduler.set_timesteps(setting.num_inference_steps)
    for timestep in scheduler.timesteps:
        base = plain(latents, timestep)
        combined = base + sum(concept(latents, timestep) - base for concept in concepts)
        latents = scheduler.step(combined, timestep, latents).prev_sample
    return pipeline.image_processor.postprocess(decode_latents(pipeline.vae, latents), output_type="np")
