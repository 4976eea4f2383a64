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
from .given_noise import GivenNoise
from .quad_setting import QuadSetting
from .setting import Sampler, Setting


TRUE_GRAPH = tuple(f"{cause}->{effect}" for cause, effect in quad.EDGES if {cause, effect} <= set(quad.CONCEPTS))
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


@dataclass(frozen=True)
class Oracle(GivenNoise):
    """Is given the simulator's noise and mechanisms: the upper bound on quad."""

    def noise(self, setting: QuadSetting, contexts: Sequence[str]) -> torch.Tensor:
        return given_noise(setting, contexts)

    def learn_concepts(self, run: TrainingRun) -> None:
        set_mechanisms(run.module, run.setting)


def given_noise(setting: QuadSetting, contexts: Sequence[str]) -> torch.Tensor:
    """The simulator's noise (n, 8), in the order of the oracle's nodes."""
    return setting.true_noise(contexts)[:, [quad.FACTORS.index(name) for name in (*quad.CONCEPTS, *_HIDDEN)]]


@torch.no_grad()
def set_mechanisms(module: ContextModule, setting: QuadSetting) -> None:
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
