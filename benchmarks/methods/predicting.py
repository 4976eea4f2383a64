"""Methods whose predictions are known: they can be added up, and invert the ODE of a given image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctx.adapter import backbone_of_pipeline, native_resolution
from diffusers_ctx.autoencoding import decode_latents, encode_pixels
from diffusers_ctx.evaluation.images import to_uint8
from diffusers_ctx.pipelines.inversion import denoise, invert

from .setting import Edit, Editor, Setting, device


Prediction = Callable[[torch.Tensor, torch.Tensor | int], torch.Tensor]
"""Latents (B, C, h, w) and a timestep to what the UNet predicts."""
Predictor = Callable[[list[str], Sequence[str]], Prediction]
"""Captions (B) and interventions to the predictions under them."""


class Predicting(ABC):
    """A method whose predictions are known."""

    @abstractmethod
    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        """What `train` saved: a pipeline, and its predictions."""

    def load_editor(self, setting: Setting, folder: Path) -> Editor:
        """Counterfactuals of what `train` saved.

        The image's ODE is followed back under the observational context and forth under the interventions, as our
        own adapter does it, without exogenous noise.
        """
        pipeline, predictor = self.load_predictor(setting, folder)
        noising = backbone_of_pipeline(pipeline).noising(pipeline.scheduler.config)

        @torch.no_grad()
        def editor(images: np.ndarray, captions: Sequence[str]) -> Edit:
            latents = encode(pipeline, images)
            steps = noising.steps(setting.num_inference_steps, latents)
            noise = invert(predictor(list(captions), []), latents, steps)

            @torch.no_grad()
            def edit(interventions: Sequence[str]) -> np.ndarray:
                latents = denoise(predictor(list(captions), interventions), noise, steps)
                return to_uint8(decode(pipeline, latents))

            return edit

        return editor


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline,
    predictor: Predictor,
    setting: Setting,
    captions: list[str],
    interventions: Sequence[str],
    generator: torch.Generator,
) -> np.ndarray:
    """Samples (n, H, W, 3) in [0, 1] of a pipeline by its predictions."""
    scheduler, size = pipeline.scheduler, native_resolution(pipeline) // pipeline.vae_scale_factor
    predict = guided(predictor, captions, interventions, setting.guidance_scale)
    noise = torch.randn(len(captions), pipeline.unet.config.in_channels, size, size, generator=generator)
    latents = noise.to(device()) * scheduler.init_noise_sigma
    scheduler.set_timesteps(setting.num_inference_steps)
    for timestep in scheduler.timesteps:
        latents = scheduler.step(predict(latents, timestep), timestep, latents).prev_sample
    return decode(pipeline, latents)


def guided(predictor: Predictor, captions: list[str], interventions: Sequence[str], scale: float) -> Prediction:
    """Predictions under classifier-free guidance, whose unconditional half has the interventions, too."""
    conditional = predictor(captions, interventions)
    if scale == 1:
        return conditional
    unconditional = predictor([""] * len(captions), interventions)

    def predict(latents: torch.Tensor, timestep: torch.Tensor | int) -> torch.Tensor:
        without = unconditional(latents, timestep)
        return without + scale * (conditional(latents, timestep) - without)

    return predict


def encode(pipeline: StableDiffusionPipeline, images: np.ndarray) -> torch.Tensor:
    """Latents (n, C, h, w) of images (n, R, R, 3) uint8."""
    mean, _ = encode_pixels(pipeline.vae, torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, device())
    return mean


def decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    """Images (n, R, R, 3) in [0, 1] of latents (n, C, h, w)."""
    return pipeline.image_processor.postprocess(decode_latents(pipeline.vae, latents), output_type="np")
