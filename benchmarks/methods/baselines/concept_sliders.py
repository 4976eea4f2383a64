"""Directions of LoRA weights for each concept, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from diffusers_ctx.adapter.backbones import UNetBackbone

from ..predicting import Predicting, Predictor
from ..setting import Sampler, Setting
from .lora import LoraTraining, add_lora, plain_sampler, save_lora, switching_predictor
from .prompt_lora import load_prompt_lora, name_concepts


@dataclass(frozen=True)
class ConceptSliders(Predicting):
    """A LoRA per concept that turns the observational prompt's prediction into the concept's, and is then added.

    In the manner of Gandikota et al. 2023 (arXiv 2311.12092), equation 7, with a `PromptLora` as the model that is
    steered: it has that one's training and as much again.

    Attributes:
        source: name of the method whose LoRA it starts from.
    """

    source: str

    def steps(self, setting: Setting) -> int:
        return self._steps_each(setting) * len(setting.bed.concepts)

    def train(self, setting: Setting, folder: Path) -> None:
        for name in setting.bed.concepts:
            pipeline = load_prompt_lora(setting, folder.parent / self.source)
            training = LoraTraining(pipeline, setting, folder / "logs", name)
            parameters = add_lora(pipeline.unet, list(UNetBackbone.lora_targets), name)

            def predict(noisy, timesteps, target, rows, pipeline=pipeline, training=training, name=name):
                captions = training.captions(rows)
                with torch.no_grad():
                    pipeline.unet.set_adapters(["names"])
                    wanted = training.predict(
                        noisy, timesteps, [name_concepts(setting.bed, x, [name]) for x in captions]
                    )
                pipeline.unet.set_adapters(["names", name])
                return training.predict(noisy, timesteps, captions), wanted

            training.run(parameters, ["obs", name], self._steps_each(setting), predict)
            save_lora(pipeline, folder, name)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = self._load(setting, folder)
        sample = plain_sampler(pipeline, setting, lambda caption, _: caption)

        def sample_with(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            pipeline.unet.set_adapters(["names", *interventions])
            return sample(captions, interventions, seed)

        return sample_with

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        pipeline = self._load(setting, folder)
        return pipeline, switching_predictor(pipeline, lambda names: pipeline.unet.set_adapters(["names", *names]))

    def _load(self, setting: Setting, folder: Path) -> StableDiffusionPipeline:
        pipeline = load_prompt_lora(setting, folder.parent / self.source)
        for name in setting.bed.concepts:
            pipeline.load_lora_weights(folder / name, adapter_name=name)
        return pipeline

    def _steps_each(self, setting: Setting) -> int:
        return setting.baseline_steps // len(setting.bed.concepts)
