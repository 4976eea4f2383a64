"""Predictions of one LoRA, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctx.autoencoding import decode_latents, native_resolution

from ..setting import Sampler, Setting, device, in_batches
from .lora import plain_sampler
from .prompt_lora import load_prompt_lora, name_concepts


@dataclass(frozen=True)
class ComposableDiffusion:
    """Adds up the change that each concept makes to the prediction of a `PromptLora`.

    Liu et al. 2022 (arXiv 2206.01714), equation 11, with the observational prompt as the unconditional one and weights
    of 1; a single concept is sampled as the LoRA samples it.

    Attributes:
        source: name of the method whose LoRA it uses.
    """

    source: str

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        load_prompt_lora(setting, folder.parent / self.source)  # which must be there

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_prompt_lora(setting, folder.parent / self.source)
        single = plain_sampler(pipeline, setting, name_concepts)

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            if len(interventions) < 2:
                return single(captions, interventions, seed)
            return in_batches(
                lambda batch, generator: compose(pipeline, setting, batch, interventions, generator),
                captions,
                seed,
            )

        return sample


@torch.no_grad()
def compose(
    pipeline: StableDiffusionPipeline,
    setting: Setting,
    captions: list[str],
    interventions: Sequence[str],
    generator: torch.Generator,
) -> np.ndarray:
    """Images (n, H, W, 3) in [0, 1]: at each step, plain + Σ (concept - plain)."""
    scheduler, size = pipeline.scheduler, native_resolution(pipeline) // pipeline.vae_scale_factor
    prompts = [*captions, *(name_concepts(caption, [name]) for name in interventions for caption in captions)]
    text, _ = pipeline.encode_prompt(prompts, device(), 1, do_classifier_free_guidance=False)
    noise = torch.randn(len(captions), 4, size, size, generator=generator)
    latents = noise.to(device()) * scheduler.init_noise_sigma
    scheduler.set_timesteps(setting.num_inference_steps)
    for timestep in scheduler.timesteps:
        copies = latents.repeat(1 + len(interventions), 1, 1, 1)
        plain, *concepts = pipeline.unet(copies, timestep, text).sample.chunk(1 + len(interventions))
        combined = plain + sum(concept - plain for concept in concepts)
        latents = scheduler.step(combined, timestep, latents).prev_sample
    return pipeline.image_processor.postprocess(decode_latents(pipeline.vae, latents), output_type="np")
