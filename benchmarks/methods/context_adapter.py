"""Context adapters in every mode and form, trained by the library's two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

import diffusers_ctx
from diffusers_ctx import ComposablePipeline, ContextModule
from diffusers_ctx.adapter import set_context_scheduler
from diffusers_ctx.adapter.image_features import ImageFeatures
from diffusers_ctx.data.held_out import hold_out
from diffusers_ctx.evaluation.images import to_uint8
from diffusers_ctx.fingerprint import fingerprint
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training import TrainingConfig
from diffusers_ctx.training.concepts.module import create_context_module
from diffusers_ctx.training.concepts.stage import ConceptStage
from diffusers_ctx.training.config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig
from diffusers_ctx.training.diffusion.noise_schedule import schedule_options
from diffusers_ctx.training.diffusion.noise_trial import NoiseTrial, trial_images
from diffusers_ctx.training.diffusion.stage import DiffusionStage
from diffusers_ctx.training.diffusion.trainable import prepare_backbone
from diffusers_ctx.training.encoding.latents import ContextLatents, LatentBatches
from diffusers_ctx.training.encoding.posterior_features import create_image_features, with_posterior_encoder
from diffusers_ctx.training.run.accelerator import create_accelerator
from diffusers_ctx.training.run.tracking import start_trackers, track_step

from .setting import BATCH_SIZE, Edit, Editor, Sampler, Setting, device, in_batches


_LEARNING_RATES = {"frozen": 2e-3, "lora": 2e-3, "full": 5e-4}


@dataclass(frozen=True)
class TrainingRun:
    """A training, ready to learn.

    Attributes:
        setting: that of all methods.
        config: the library's options.
        accelerator: the processes.
        pipeline: the base, with the module attached.
        module: the context module.
        latents: the images, encoded.
    """

    setting: Setting
    config: TrainingConfig
    accelerator: Accelerator
    pipeline: ComposablePipeline
    module: ContextModule
    latents: ContextLatents


@dataclass(frozen=True)
class ContextAdapter:
    """A context adapter.

    Attributes:
        mode: `frozen`, `lora` or `full`.
        context: options of the module and of learning the concepts.
        match_prompt: whether samples' noise fits the captions; `None` as a user gets it.
    """

    mode: str = "lora"
    context: ContextConfig = field(default_factory=ContextConfig)
    match_prompt: bool | None = False

    @property
    def learns_graph(self) -> bool:
        return self.context.graph is None

    def steps(self, setting: Setting) -> int:
        return setting.train_steps

    def train(self, setting: Setting, folder: Path) -> None:
        pipeline = ComposablePipeline.from_pretrained(setting.base)
        config = with_posterior_encoder(self.config(setting, folder), pipeline)
        accelerator = create_accelerator(config)
        set_seed(setting.seed)
        features = create_image_features(config, pipeline)
        module = self.create_module(config, pipeline, features)
        prepare_backbone(pipeline, module, config.model, accelerator)
        if schedule := schedule_options(config.model, pipeline):
            set_context_scheduler(pipeline, schedule)
        start_trackers(accelerator, {})
        latents, held_out = self.encode(setting, features), None
        if count := self.trial_images(latents):
            learned, rest = hold_out(latents.contexts, count)
            latents, held_out = latents.select(learned), latents.select(rest)
        run = TrainingRun(setting, config, accelerator, pipeline, module, latents)
        self.learn_concepts(run)
        set_seed(setting.seed)  # what follows is the same, whether the concepts were on disk or not
        _learn_adapter(run, None if held_out is None else NoiseTrial(held_out, setting.train_batch_size, setting.seed))
        pipeline.save_context_adapter(folder, mode=self.mode)
        if self.mode == "full":  # the adapter belongs to the UNet that learned with it
            pipeline.save_pretrained(folder)
        accelerator.end_training()

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_pipeline(folder, setting.base, full=self.mode == "full")
        return adapter_sampler(
            pipeline,
            setting.num_inference_steps,
            match_prompt=self.match_prompt,
            guidance_scale=setting.guidance_scale,
        )

    def load_editor(self, setting: Setting, folder: Path) -> Editor:
        """Counterfactuals as a user makes them."""
        pipeline = load_pipeline(folder, setting.base, full=self.mode == "full")

        def editor(images: np.ndarray, captions: Sequence[str]) -> Edit:
            steps = setting.num_inference_steps
            options = {"prompt": list(captions), "num_inference_steps": steps, "output_type": "np"}
            return lambda names: to_uint8(pipeline.counterfactual(images, list(names), **options).images)

        return editor

    def config(self, setting: Setting, folder: Path) -> TrainingConfig:
        return TrainingConfig(
            ModelConfig(setting.base, mode=self.mode, unfreeze_after=0.2 if self.mode == "full" else 0.0),
            DataConfig(
                train_data_dir=str(setting.data_dir),
                concepts=list(setting.bed.concepts),
                resolution=setting.resolution,
            ),
            replace(self.context, concept_steps=setting.concept_steps),
            OptimizationConfig(
                seed=setting.seed,
                train_batch_size=setting.train_batch_size,
                max_train_steps=self.steps(setting),
                learning_rate=_LEARNING_RATES[self.mode],
                lr_scheduler="cosine",
                lr_warmup_steps=50,
            ),
            OutputConfig(output_dir=str(folder)),
        )

    # What ablations change

    def trial_images(self, latents: ContextLatents) -> int:
        """Images of each context that say whether noise earns its place, as the trainer holds them out."""
        return trial_images(latents.contexts)

    def create_module(
        self, config: TrainingConfig, pipeline: ComposablePipeline, features: ImageFeatures | None
    ) -> ContextModule:
        return create_context_module(config, pipeline, config.data.concepts, features, config.data.resolution)

    def encode(self, setting: Setting, features: ImageFeatures | None) -> ContextLatents:
        """The latents that all methods share, with the features that the posterior reads, if any."""
        latents = setting.latents()
        if features is None:
            return latents

        def compute() -> torch.Tensor:  # features of the UNet depend on latents alone
            means = latents.mean[0].to(device()).split(BATCH_SIZE)
            return torch.cat([features(mean, mean).cpu() for mean in means])[None]

        return replace(latents, features=setting.shared(f"features-{features.digest()}", compute))

    def learn_concepts(self, run: TrainingRun) -> None:
        """Learns the concepts, or takes those of a method that differs in nothing that they depend on."""
        module, context = run.module, run.config.context

        def compute() -> dict[str, torch.Tensor]:
            encode_captions = Conditioner.of(run.pipeline).encode_captions
            ConceptStage(
                run.accelerator, module, run.latents, context, run.setting.seed, encode_captions=encode_captions
            ).run()
            return module.state_dict()

        options = {name: value for name, value in module.config.items() if not name.startswith("_")}
        features_from = None if context.posterior_encoder == "vae" else run.setting.base
        code = learning_code_fingerprint(Path(diffusers_ctx.__file__).parent)
        key = fingerprint(type(self).__name__, options, asdict(context), features_from, code)
        module.load_state_dict(run.setting.shared(f"concepts-{key}", compute))


def _learn_adapter(run: TrainingRun, trial: NoiseTrial | None) -> None:
    options = run.config.optimization
    batches = LatentBatches(run.latents, options.train_batch_size, options.seed)
    stage = DiffusionStage(
        run.accelerator,
        run.pipeline,
        batches,
        run.config,
        options.max_train_steps,
        options.learning_rate,
        trial=trial,
    )
    for metrics in tqdm(stage.steps(), total=options.max_train_steps, desc="Training"):
        track_step(run.accelerator, metrics, stage.step)
    stage.finish()


def learning_code_fingerprint(package: Path) -> str:
    """Of the code that learns concepts: what an earlier version learned is not taken for what this one would learn."""
    files = [file for name in ("context", "data", "training") for file in (package / name).rglob("*.py")]
    files += [package / "autoencoding.py", package / "keyed_random.py"]
    return fingerprint(*sorted(files))


def adapter_sampler(
    pipeline: ComposablePipeline,
    num_inference_steps: int,
    intervenes: bool = True,
    has_noise: bool = True,
    match_prompt: bool | None = False,
    guidance_scale: float = 1.0,
    context_guidance_scale: float = 1.0,
) -> Sampler:
    """Samples of a pipeline with an adapter.

    Args:
        pipeline: the pipeline.
        num_inference_steps: denoising steps.
        intervenes: whether the adapter is given the interventions.
        has_noise: whether samples have exogenous noise; zeros otherwise.
        match_prompt: whether noise is chosen to match the captions; `None` if the adapter has learned them.
        guidance_scale: that of classifier-free guidance.
        context_guidance_scale: that of the context.
    """

    def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
        def sample_batch(prompts: list[str], generator: torch.Generator) -> np.ndarray:
            shape = (len(prompts), *pipeline.context_module.noise_shape)
            return pipeline(
                prompts,
                interventions=list(interventions) if intervenes else [],
                exogenous_noise=None if has_noise else torch.zeros(shape),
                match_prompt=match_prompt,
                generator=generator,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                context_guidance_scale=context_guidance_scale,
                output_type="np",
            ).images

        return in_batches(sample_batch, captions, seed)

    return sample


def load_pipeline(folder: str | Path, base: str, full: bool = False) -> ComposablePipeline:
    """A base with the adapter of a folder; `full` if the folder holds the base too."""
    pipeline = ComposablePipeline.from_pretrained(folder if full else base)
    pipeline.load_context_adapter(folder)
    pipeline.to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
