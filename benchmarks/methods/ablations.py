"""Context adapters without one of their parts, and their upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from diffusers_ctx import ComposablePipeline, ContextModule
from diffusers_ctx.adapter.image_features import ImageFeatures
from diffusers_ctx.context.posterior import GaussianPosterior
from diffusers_ctx.data import quad
from diffusers_ctx.training import TrainingConfig
from diffusers_ctx.training.encoding.latents import ContextLatents

from .context_adapter import ContextAdapter, TrainingRun, adapter_sampler, load_pipeline
from .setting import Sampler, Setting


_HIDDEN = ("color", "shape")  # no context of the benchmark intervenes on them


@dataclass(frozen=True)
class Ablation(ContextAdapter):
    """A context adapter that lacks a part."""

    @property
    def learns_graph(self) -> bool:
        return False


@dataclass(frozen=True)
class Pooled(Ablation):
    """Is trained without context labels."""

    def encode(self, setting: Setting, features: ImageFeatures | None) -> ContextLatents:
        latents = super().encode(setting, features)
        return replace(latents, masks=torch.zeros_like(latents.masks))

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder, setting.base)
        return adapter_sampler(pipeline, setting.num_inference_steps, intervenes=False)


class UnconditionalModule(ContextModule):
    """A module whose amortized posterior is not conditioned on the context."""

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        return super().posterior(latents, torch.zeros_like(mask))


@dataclass(frozen=True)
class UnconditionalPosterior(Ablation):
    """Has a posterior that is not conditioned on the context."""

    def create_module(
        self, config: TrainingConfig, pipeline: ComposablePipeline, features: ImageFeatures | None
    ) -> ContextModule:
        return UnconditionalModule.from_config(super().create_module(config, pipeline, features).config)


class GivenNoiseModule(ContextModule):
    """A module whose posterior reads the exogenous noise itself, (B, N, d), in place of an image."""

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        size = latents[0].numel()
        return GaussianPosterior(
            latents, latents.new_zeros(len(latents), size, size), latents.new_zeros(latents.shape[:2])
        )


@dataclass(frozen=True)
class Oracle(Ablation):
    """Is given the simulator's noise and mechanisms: the upper bound."""

    def steps(self, setting: Setting) -> int:
        return setting.baseline_steps  # it learns no concepts

    def create_module(
        self, config: TrainingConfig, pipeline: ComposablePipeline, features: ImageFeatures | None
    ) -> ContextModule:
        return GivenNoiseModule.from_config(super().create_module(config, pipeline, features).config)

    def encode(self, setting: Setting, features: ImageFeatures | None) -> ContextLatents:
        latents = super().encode(setting, features)
        return replace(latents, features=self.noise(setting, latents.contexts)[None, ..., None])

    def noise(self, setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
        """The noise of each image's nodes, (n, N)."""
        return given_noise(setting, contexts)

    def learn_concepts(self, run: TrainingRun) -> None:
        set_mechanisms(run.module, run.setting)


@dataclass(frozen=True)
class LabelsOnly(Oracle):
    """Has no noise: a node's tokens say whether it was intervened on, and nothing else."""

    def noise(self, setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(contexts), len(quad.CONCEPTS) + self.context.num_hidden_factors)

    @torch.no_grad()
    def learn_concepts(self, run: TrainingRun) -> None:
        run.module.mechanism.bias_do.fill_(1)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder, setting.base)
        return adapter_sampler(pipeline, setting.num_inference_steps, has_noise=False)


def given_noise(setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
    """The simulator's noise (n, 8), in the order of the oracle's nodes."""
    return setting.true_noise(contexts)[:, [quad.FACTORS.index(name) for name in (*quad.CONCEPTS, *_HIDDEN)]]


@torch.no_grad()
def set_mechanisms(module: ContextModule, setting: Setting) -> None:
    """Gives a structural module with quad's own graph quad's own mechanisms, for standardized factors."""
    names = [*quad.CONCEPTS, *_HIDDEN]
    order = [quad.FACTORS.index(name) for name in names]
    deviation = torch.tensor(quad.observational_deviation(setting.dependent))[order]
    weights = torch.tensor(quad.edge_matrix(setting.dependent))[order][:, order]
    module.causal.blocks.copy_((weights * deviation / deviation[:, None])[..., None, None])
    noise = torch.tensor([quad.NOISE_VARIANCES[name] for name in names]).sqrt() / deviation
    module.mechanism.weight_obs.copy_(noise[:, None, None])
    means, variances = torch.tensor([quad.INTERVENTIONS[name] for name in quad.CONCEPTS]).double().T
    scale = deviation[: len(quad.CONCEPTS)]
    module.mechanism.weight_do.copy_((variances.sqrt() / scale)[:, None, None])
    module.mechanism.bias_do.copy_((means / scale)[:, None])


def oracle_graph(dependent: bool) -> tuple[str, ...]:
    """quad's graph as edges `cause->effect` among the oracle's nodes."""
    renamed = {name: f"hidden_{index}" for index, name in enumerate(_HIDDEN)}
    edges = quad.EDGES if dependent else ()
    # with no edge of a hidden factor, the module would let each cause every concept
    return tuple(f"{renamed.get(cause, cause)}->{renamed.get(effect, effect)}" for cause, effect in edges)
