"""Predictions of one model under single concepts, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from ..predicting import Predicting, Prediction, Predictor, draw
from ..setting import Method, Sampler, Setting, in_batches


class PredictingMethod(Method, Protocol):
    """A method whose predictions can be added up; see [`Predicting`]."""

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]: ...


@dataclass(frozen=True)
class ComposableDiffusion(Predicting):
    """Adds up the change that each concept makes to the prediction of a method that knows the concepts one by one.

    Liu et al. 2022 (arXiv 2206.01714), equation 11, with the observational context as the unconditional one and
    weights of 1; a single concept is sampled as that method samples it.

    Attributes:
        source: name of the method.
        method: the method.
    """

    source: str
    method: PredictingMethod

    def steps(self, setting: Setting) -> int:
        return 0

    def train(self, setting: Setting, folder: Path) -> None:
        self.method.load_predictor(setting, folder.parent / self.source)  # which must be there

    def load(self, setting: Setting, folder: Path) -> Sampler:
        single = self.method.load(setting, folder.parent / self.source)
        pipeline, predictor = self.load_predictor(setting, folder)

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            if len(interventions) < 2:
                return single(captions, interventions, seed)
            return in_batches(
                lambda batch, generator: draw(pipeline, predictor, setting, batch, interventions, generator),
                captions,
                seed,
            )

        return sample

    def load_predictor(self, setting: Setting, folder: Path) -> tuple[StableDiffusionPipeline, Predictor]:
        pipeline, predictor = self.method.load_predictor(setting, folder.parent / self.source)
        return pipeline, partial(_added, predictor)


def _added(predictor: Predictor, captions: list[str], interventions: Sequence[str]) -> Prediction:
    """plain + Σ (concept - plain); of one concept or none, the prediction itself."""
    if len(interventions) < 2:
        return predictor(captions, interventions)
    plain, *concepts = (predictor(captions, names) for names in ([], *([name] for name in interventions)))

    def predict(latents: torch.Tensor, timestep: torch.Tensor | int) -> torch.Tensor:
        base = plain(latents, timestep)
        return base + sum(concept(latents, timestep) - base for concept in concepts)

    return predict
