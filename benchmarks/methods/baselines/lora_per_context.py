"""A LoRA for each context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline

from diffusers_ctx.adapter.backbones import UNetBackbone

from ..predicting import Predicting, Predictor
from ..setting import Sampler, Setting
from .lora import LoraTraining, add_lora, load_base, plain_sampler, save_lora, switching_predictor


@dataclass(frozen=True)
class LoraPerContext(Predicting):
    """A LoRA for each context, trained on its images alone; compositions add those of several concepts."""

    def steps(self, setting: Setting) -> int:
        count = len(setting.bed.contexts)
        return setting.baseline_steps // count * count

    def train(self, setting: Setting, folder: Path) -> None:
        contexts = setting.bed.contexts
        for name in contexts:
            pipeline = load_base(setting)
            training = LoraTraining(pipeline, setting, folder / "logs", name)

            def predict(noisy, timesteps, target, rows, training=training):
                return training.predict(noisy, timesteps, training.captions(rows)), target

            parameters = add_lora(pipeline.unet, list(UNetBackbone.lora_targets), name)
            training.run(parameters, [name], setting.baseline_steps // len(contexts), predict)
            save_lora(pipeline, folder, name)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_loras(setting, folder)
        sample = plain_sampler(pipeline, setting, lambda caption, _: caption)

        def sample_with(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            pipeline.set_adapters(*self.weights(interventions))
            return sample(captions, interventions, seed)

        return sample_with

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        pipeline = load_loras(setting, folder)
        return pipeline, switching_predictor(pipeline, lambda names: pipeline.set_adapters(*self.weights(names)))

    def weights(self, interventions: Sequence[str]) -> tuple[list[str], list[float]]:
        """The LoRAs of a combination, and their weights."""
        names = list(interventions) or ["obs"]
        return names, [1.0] * len(names)


@dataclass(frozen=True)
class LoraDifference(LoraPerContext):
    """The same LoRAs, composed as their sum less the observational one for each concept after the first.

    The base has the distribution of all contexts pooled, and a LoRA learns how its context differs from that. A sum of
    two would therefore count twice what the observational one has learned.

    Attributes:
        source: name of the method whose LoRAs these are.
    """

    source: str

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        load_loras(setting, folder.parent / self.source)  # which must be there

    def load(self, setting: Setting, folder: Path) -> Sampler:
        return super().load(setting, folder.parent / self.source)

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        return super().load_predictor(setting, folder.parent / self.source)

    def weights(self, interventions: Sequence[str]) -> tuple[list[str], list[float]]:
        names, weights = super().weights(interventions)
        return ([*names, "obs"], [*weights, 1.0 - len(names)]) if len(names) > 1 else (names, weights)


def load_loras(setting: Setting, folder: Path) -> StableDiffusionPipeline:
    """The base with the LoRAs of all contexts."""
    if not (folder / "obs").exists():
        raise FileNotFoundError(f"Run the method '{folder.name}' first: its LoRAs are needed, and {folder} has none.")
    pipeline = load_base(setting)
    for name in setting.bed.contexts:
        pipeline.load_lora_weights(folder / name, adapter_name=name)
    return pipeline
