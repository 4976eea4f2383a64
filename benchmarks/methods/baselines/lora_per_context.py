"""A LoRA for each context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_ctx.data import quad
from diffusers_ctx.training.diffusion.trainable import LORA_TARGETS

from ..setting import Sampler, Setting
from .lora import LoraTraining, add_lora, load_base, plain_sampler, save_lora


@dataclass(frozen=True)
class LoraPerContext:
    """A LoRA for each context, trained on its images alone; compositions add those of several concepts."""

    def steps(self, setting: Setting) -> int:
        count = len(quad.contexts())
        return setting.baseline_steps // count * count

    def train(self, setting: Setting, folder: Path) -> None:
        latents, contexts = setting.latents(), quad.contexts()
        for name in contexts:
            pipeline = load_base(setting)
            training = LoraTraining(pipeline, latents, setting.seed, folder / "logs", name)

            def predict(noisy, timesteps, target, rows, training=training):
                return training.predict(noisy, timesteps, training.captions(rows)), target

            parameters = add_lora(pipeline.unet, LORA_TARGETS, name)
            training.run(parameters, [name], setting.baseline_steps // len(contexts), predict)
            save_lora(pipeline, folder, name)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_base(setting)
        for name in quad.contexts():
            pipeline.load_lora_weights(folder / name, adapter_name=name)
        sample = plain_sampler(pipeline, setting, lambda caption, _: caption)

        def sample_with(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            pipeline.set_adapters(list(interventions) or ["obs"])
            return sample(captions, interventions, seed)

        return sample_with
