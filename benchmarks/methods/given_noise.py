"""Context adapters whose exogenous noise is given: none at all, for one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusers_ctx import ComposablePipeline, ContextModule
from diffusers_ctx.adapter import backbone_of_pipeline
from diffusers_ctx.adapter.image_features import ImageFeatures
from diffusers_ctx.context import intervention_mask
from diffusers_ctx.context.posterior import GaussianPosterior
from diffusers_ctx.training import TrainingConfig
from diffusers_ctx.training.encoding.latents import ContextLatents

from .context_adapter import ContextAdapter, TrainingRun, adapter_sampler, load_pipeline
from .predicting import Predicting, Prediction, Predictor
from .setting import Sampler, Setting, device


class GivenNoiseModule(ContextModule):
    """A module whose posterior reads the exogenous noise itself, (B, N, d), in place of an image."""

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        size = latents[0].numel()
        return GaussianPosterior(
            latents, latents.new_zeros(len(latents), size, size), latents.new_zeros(latents.shape[:2])
        )


@dataclass(frozen=True)
class GivenNoise(ContextAdapter, ABC):
    """A context adapter that is given each image's noise; it learns no concepts."""

    @property
    def learns_graph(self) -> bool:
        return False

    def steps(self, setting: Setting) -> int:
        return setting.baseline_steps

    def create_module(
        self, config: TrainingConfig, pipeline: ComposablePipeline, features: ImageFeatures | None
    ) -> ContextModule:
        return GivenNoiseModule.from_config(super().create_module(config, pipeline, features).config)

    def encode(self, setting: Setting, features: ImageFeatures | None) -> ContextLatents:
        latents = super().encode(setting, features)
        return replace(latents, features=self.noise(setting, latents.contexts)[None, ..., None])

    def trial_images(self, latents: ContextLatents) -> int:
        return 0  # its noise is not in doubt

    @abstractmethod
    def noise(self, setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
        """The noise of each image's nodes, (n, N)."""


@dataclass(frozen=True)
class LabelsOnly(Predicting, GivenNoise):
    """Has no noise: a node's tokens say whether it was intervened on, and nothing else."""

    def noise(self, setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(contexts), len(setting.bed.concepts) + self.context.num_hidden_factors)

    @torch.no_grad()
    def learn_concepts(self, run: TrainingRun) -> None:
        run.module.mechanism.bias_do.fill_(1)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder, setting.base)
        return adapter_sampler(
            pipeline, setting.num_inference_steps, has_noise=False, guidance_scale=setting.guidance_scale
        )

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[ComposablePipeline, Predictor]:
        pipeline = load_pipeline(folder, setting.base)
        module = pipeline.context_module

        def predictor(captions: list[str], interventions: Sequence[str]) -> Prediction:
            text, _ = pipeline.encode_prompt(captions, device(), 1, do_classifier_free_guidance=False)
            mask = intervention_mask(list(interventions), module.config.concepts, len(captions)).to(device())
            tokens = module(torch.zeros(len(captions), *module.noise_shape, device=device()), mask)
            conditions = backbone_of_pipeline(pipeline).with_tokens({"encoder_hidden_states": text}, tokens)
            return lambda latents, timestep: pipeline.unet(latents, timestep, **conditions).sample

        return pipeline, predictor
