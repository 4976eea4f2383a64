"""Context adapters in every mode and form, their upper bound, and what is left of them without their parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed

import diffusers_ctx
from diffusers_ctx import ComposablePipeline, ContextModule
from diffusers_ctx.context.posterior import GaussianPosterior
from diffusers_ctx.data import quad
from diffusers_ctx.training import ContextTrainer, TrainingConfig
from diffusers_ctx.training.config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig
from diffusers_ctx.training.encoding.latent_cache import cached
from diffusers_ctx.training.encoding.latents import ContextLatents

from .setting import BATCH_SIZE, Sampler, Setting, device, in_batches


TRUE_GRAPH = tuple(f"{cause}->{effect}" for cause, effect in quad.EDGES if {cause, effect} <= set(quad.CONCEPTS))
_HIDDEN = ("color", "shape")  # what no context of the benchmark intervenes on
_LEARNING_RATES = {"frozen": 2e-3, "lora": 2e-3, "full": 5e-4}


class BenchmarkTrainer(ContextTrainer):
    """Takes the latents that all methods share, and the concepts of a row that learned the same ones.

    Args:
        setting: the comparison.
        config: the run.
    """

    def __init__(self, setting: Setting, config: TrainingConfig):
        self.setting = setting
        super().__init__(config, ComposablePipeline.from_pretrained(setting.base))

    def _encode(self, dataset: datasets.Dataset, seed: int) -> ContextLatents:
        image_features = self._image_features
        self._features_digest = None if image_features is None else image_features.digest()
        if image_features is None:
            return self.setting.latents()
        if self.config.context.posterior_encoder != "unet":
            return super()._encode(dataset, seed)
        latents = self.setting.latents()

        def make_features() -> dict[str, torch.Tensor]:  # they depend on latents alone
            means = latents.mean[0].to(self.accelerator.device).split(BATCH_SIZE)
            return {"features": torch.cat([image_features(mean, mean).cpu() for mean in means])[None]}

        return replace(latents, **cached(self._folder / "features", self._features_digest, make_features))

    def _learn_concepts(self) -> dict[str, float]:
        """Rows that differ in nothing that has a part in it learn the same."""

        def learn() -> dict[str, torch.Tensor]:
            super(BenchmarkTrainer, self)._learn_concepts()
            return self.context_module.state_dict()

        self.context_module.load_state_dict(cached(self._folder / "concepts", self._concepts_key(), learn))
        set_seed(self.config.optimization.seed)  # what follows is the same with and without the file
        return {}

    @property
    def _folder(self) -> Path:
        return self.setting.work_dir / self.setting.name

    def _concepts_key(self) -> str:
        module = {name: value for name, value in self.context_module.config.items() if not name.startswith("_")}
        decisive = [type(self).__name__, self._features_digest, module, asdict(self.config.context)]
        decisive.append(learning_code_digest(Path(diffusers_ctx.__file__).parent))
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16]


def learning_code_digest(package: Path) -> str:
    """Of the code that learns concepts: what an earlier version learned must not be taken for what this one would."""
    files = sorted(file for name in ("context", "training") for file in (package / name).rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class PooledTrainer(BenchmarkTrainer):
    """Is not told which image is of which context."""

    def _encode(self, dataset: datasets.Dataset, seed: int) -> ContextLatents:
        latents = super()._encode(dataset, seed)
        return replace(latents, masks=torch.zeros_like(latents.masks))


class UntoldModule(ContextModule):
    """A module whose posterior is not told the context."""

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        return super().posterior(latents, torch.zeros_like(mask))


class UntoldTrainer(BenchmarkTrainer):
    """Trains an `UntoldModule`."""

    def _create_context_module(self, concepts: list[str]) -> ContextModule:
        return UntoldModule.from_config(super()._create_context_module(concepts).config)


class GivenNoiseModule(ContextModule):
    """A module without a posterior: the noise is the standard normal numbers it is handed."""

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        nodes, dim = self.noise_shape
        mean = latents.new_zeros(len(latents), nodes, dim)
        factor = torch.eye(nodes * dim, device=mean.device).expand(len(mean), -1, -1)
        return GaussianPosterior(mean, factor, mean.new_zeros(len(mean), nodes))


class GivenNoiseTrainer(BenchmarkTrainer):
    """Trains a `GivenNoiseModule` with mechanisms and noise that are given too."""

    def _create_context_module(self, concepts: list[str]) -> ContextModule:
        return GivenNoiseModule.from_config(super()._create_context_module(concepts).config)

    def _encode(self, dataset: datasets.Dataset, seed: int) -> ContextLatents:
        latents = super()._encode(dataset, seed)
        self.noise = self._given_noise(latents.contexts)
        return latents

    def _given_noise(self, contexts: Sequence[str]) -> torch.Tensor:
        return given_noise(self.setting, contexts)

    def _learn_concepts(self) -> dict[str, float]:
        set_mechanisms(self.context_module, self.setting)
        return {}

    def _step_inputs(self, number: int, batch: dict[str, Any]) -> tuple[Any, ...]:
        *inputs, exogenous, features = super()._step_inputs(number, batch)
        return (*inputs, self.noise[batch["index"].cpu()][..., None].to(exogenous), features)


class LabelsTrainer(GivenNoiseTrainer):
    """Without noise: a node's tokens say whether it was intervened on, and nothing else."""

    def _given_noise(self, contexts: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(contexts), self.context_module.noise_shape[0])

    def _learn_concepts(self) -> dict[str, float]:
        with torch.no_grad():
            self.context_module.mechanism.bias_do.fill_(1)
        return {}


def given_noise(setting: Setting, contexts: Sequence[str]) -> torch.Tensor:
    """The simulator's noise (n, 8), in the order of the oracle's nodes."""
    return setting.true_noise(contexts)[:, [quad.FACTORS.index(name) for name in (*quad.CONCEPTS, *_HIDDEN)]]


@torch.no_grad()
def set_mechanisms(module: ContextModule, setting: Setting) -> None:
    """Gives a structural module with quad's own graph quad's own mechanisms, for standardised factors."""
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
    renamed = {name: f"hidden_{index}" for index, name in enumerate(_HIDDEN)}
    edges = quad.EDGES if dependent else ()
    # with no edge of a hidden factor, the module would let each cause every concept
    return tuple(f"{renamed.get(cause, cause)}->{renamed.get(effect, effect)}" for cause, effect in edges)


@dataclass(frozen=True)
class ContextAdapter:
    """A context adapter.

    Attributes:
        mode: `frozen`, `lora` or `full`.
        context: options of the module and of learning the concepts.
        trainer: what trains it.
        told: whether the sampler is told the interventions.
        noise: whether samples have exogenous noise.
    """

    mode: str = "lora"
    context: ContextConfig = field(default_factory=ContextConfig)
    trainer: type[BenchmarkTrainer] = BenchmarkTrainer
    told: bool = True
    noise: bool = True

    def train(self, setting: Setting, folder: Path) -> None:
        self.trainer(setting, self.config(setting, folder)).train()

    def config(self, setting: Setting, folder: Path) -> TrainingConfig:
        return TrainingConfig(
            ModelConfig(setting.base, mode=self.mode, unfreeze_after=0.2 if self.mode == "full" else 0.0),
            DataConfig(train_data_dir=str(setting.data_dir), concepts=list(quad.CONCEPTS), resolution=quad.RESOLUTION),
            replace(self.context, concept_steps=setting.concept_steps),
            OptimizationConfig(
                seed=setting.seed,
                train_batch_size=64,
                max_train_steps=setting.rival_steps if self._is_given_concepts else setting.train_steps,
                learning_rate=_LEARNING_RATES[self.mode],
                lr_scheduler="cosine",
                lr_warmup_steps=50,
            ),
            OutputConfig(
                output_dir=str(folder),
                checkpointing_steps=500,
                checkpoints_total_limit=1,
                resume_from_checkpoint="latest",
            ),
        )

    @property
    def _is_given_concepts(self) -> bool:
        return issubclass(self.trainer, GivenNoiseTrainer)

    @property
    def learns_graph(self) -> bool:
        return self.context.graph is None and self.trainer is BenchmarkTrainer

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder, setting.base, full=self.mode == "full")
        return adapter_sampler(pipeline, setting.num_inference_steps, self.told, self.noise)


def adapter_sampler(
    pipeline: ComposablePipeline,
    num_inference_steps: int,
    told: bool = True,
    noise: bool = True,
    match_prompt: bool = False,
) -> Sampler:
    """Samples of a pipeline with an adapter; `told` and `noise` as in `ContextAdapter`."""

    def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
        def sample_batch(prompts: list[str], generator: torch.Generator) -> np.ndarray:
            shape = (len(prompts), *pipeline.context_module.noise_shape)
            return pipeline(
                prompts,
                interventions=list(interventions) if told else [],
                exogenous_noise=None if noise else torch.zeros(shape),
                match_prompt=match_prompt,
                generator=generator,
                num_inference_steps=num_inference_steps,
                guidance_scale=1.0,
                output_type="np",
            ).images

        return in_batches(sample_batch, captions, seed)

    return sample


def load_pipeline(folder: Path, base: str, full: bool = False) -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(folder if full else base)
    pipeline.load_context_adapter(folder)
    pipeline.to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
