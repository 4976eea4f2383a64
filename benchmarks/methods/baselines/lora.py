"""What people would use instead: LoRAs, and the ways of composing them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from diffusers_ctx.data import ContextBalancedSampler, quad
from diffusers_ctx.training.diffusion.trainable import LORA_TARGETS
from diffusers_ctx.training.encoding.latents import ContextLatents

from .setting import Sampler, Setting, device, in_batches


# rare tokens, as is usual for naming what the text encoder does not know; the base knows no concept of quad, and its
# letters mean so much the same that a LoRA alone had not told them apart after 400 steps: their embeddings learn too
RARE_TOKENS = dict(zip(quad.CONCEPTS, "bdfhkz"))
_EMBEDDINGS_RATE = 10  # times the LoRA's
RANK = 16
TRAIN_BATCH_SIZE = 64
LEARNING_RATE = 2e-3
EMPTY_PROMPT_SHARE = 0.1
_EMBEDDINGS = "rare_tokens.safetensors"
_TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def name_concepts(caption: str, interventions: Sequence[str]) -> str:
    return ", ".join([caption, *(RARE_TOKENS[name] for name in interventions)])


def load_base(setting: Setting) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(setting.base, torch_dtype=torch.float32).to(device())
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    return pipeline


def add_lora(module: torch.nn.Module, targets: list[str], adapter_name: str) -> list[torch.nn.Parameter]:
    """Adds a LoRA to a UNet or text encoder, makes it the one in use and returns its parameters."""
    module.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets), adapter_name
    )
    return [p for name, p in module.named_parameters() if f".{adapter_name}." in name]


def rare_token_rows(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    """The rows (6,) of the text encoder's embeddings that stand for concepts."""
    return torch.tensor([pipeline.tokenizer(token).input_ids[1] for token in RARE_TOKENS.values()])


def learn_rare_tokens(pipeline: StableDiffusionPipeline, seed: int) -> torch.nn.Parameter:
    """Lets the embeddings of the rare tokens learn, from new values far enough apart; returns all embeddings."""
    embeddings = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    rows = rare_token_rows(pipeline)
    with torch.no_grad():
        new = torch.randn(len(rows), embeddings.shape[1], generator=torch.Generator().manual_seed(seed))
        embeddings[rows] = new.to(embeddings.device)
    learning = torch.zeros(len(embeddings), 1, device=embeddings.device)
    learning[rows] = 1
    embeddings.register_hook(lambda gradient: gradient * learning)
    return embeddings


@dataclass
class LoraTraining:
    """The usual loop of a text-to-image LoRA, on latents.

    Attributes:
        pipeline: what is trained.
        latents: all images.
        seed: of batches and noise.
        log_dir: where TensorBoard is told of the loss.
        name: what is trained, for the log.
    """

    pipeline: StableDiffusionPipeline
    latents: ContextLatents
    seed: int
    log_dir: Path
    name: str

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def run(
        self,
        parameters: list[torch.nn.Parameter],
        contexts: Sequence[str],
        steps: int,
        predict: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        embeddings: torch.nn.Parameter | None = None,
    ) -> None:
        """Minimises the distance between the two tensors that `predict(noisy, timesteps, target, rows)` returns."""
        generator = self.generator
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if embeddings is not None:
            groups.append({"params": [embeddings], "lr": _EMBEDDINGS_RATE * LEARNING_RATE, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
        scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        log = SummaryWriter(self.log_dir)
        batches = itertools.islice(self._batches(contexts), steps)
        for step, rows in enumerate(tqdm(batches, total=steps, desc="Training"), start=1):
            shape = (len(rows), *self.latents.mean.shape[2:])
            clean = self.latents.draw(rows, torch.randn(shape, generator=generator), torch.zeros(len(rows)))
            noise = torch.randn(shape, generator=generator)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
            clean, noise, timesteps = (drawn.to(device()) for drawn in (clean, noise, timesteps))
            noisy = scheduler.add_noise(clean, noise, timesteps)
            loss = F.mse_loss(*predict(noisy, timesteps, scheduler.get_velocity(clean, noise, timesteps), rows))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.add_scalar(f"loss/{self.name}", loss.item(), step)
        log.close()

    def prompts(self, rows: torch.Tensor, name: bool) -> list[str]:
        """Captions, with the rare token of each image's context if `name`; some are left empty."""
        drop = torch.rand(len(rows), generator=self.generator) < EMPTY_PROMPT_SHARE
        captions = ["" if dropped else self.latents.captions[row] for row, dropped in zip(rows.tolist(), drop)]
        if not name:
            return captions
        contexts = [quad.contexts()[self.latents.contexts[row]] for row in rows.tolist()]
        return [name_concepts(caption, interventions) for caption, interventions in zip(captions, contexts)]

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        text, _ = self.pipeline.encode_prompt(prompts, device(), 1, do_classifier_free_guidance=False)
        return self.pipeline.unet(noisy, timesteps, text).sample

    def _batches(self, contexts: Sequence[str]) -> Iterator[torch.Tensor]:
        rows = torch.tensor([row for row, name in enumerate(self.latents.contexts) if name in contexts])
        sampler = ContextBalancedSampler([self.latents.contexts[row] for row in rows], self.seed)
        waiting: list[int] = []
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            waiting += list(sampler)
            while len(waiting) >= TRAIN_BATCH_SIZE:
                yield rows[waiting[:TRAIN_BATCH_SIZE]]
                waiting = waiting[TRAIN_BATCH_SIZE:]


def save_lora(pipeline: StableDiffusionPipeline, folder: Path, adapter_name: str, with_text: bool = False) -> None:
    def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(module, adapter_name=adapter_name)

    StableDiffusionPipeline.save_lora_weights(
        folder / adapter_name, state(pipeline.unet), state(pipeline.text_encoder) if with_text else None
    )


def plain_sampler(pipeline: StableDiffusionPipeline, setting: Setting, prompt: Callable[..., str]) -> Sampler:
    """Samples the prompts `prompt(caption, interventions)`."""

    def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
        def sample_batch(batch: list[str], generator: torch.Generator) -> np.ndarray:
            return pipeline(
                [prompt(caption, interventions) for caption in batch],
                generator=generator,
                num_inference_steps=setting.num_inference_steps,
                guidance_scale=1.0,
                output_type="np",
            ).images

        return in_batches(sample_batch, captions, seed)

    return sample


@dataclass(frozen=True)
class PromptLora:
    """One LoRA on UNet and text encoder, with prompts that name the intervention, or do not.

    Names are rare tokens whose embeddings learn, as in textual inversion.

    Attributes:
        contexts: those it is trained on.
        named: whether prompts name the intervention; compositions name several.
    """

    contexts: tuple[str, ...] = tuple(quad.contexts())
    named: bool = True

    def train(self, setting: Setting, folder: Path) -> None:
        pipeline = load_base(setting)
        training = LoraTraining(pipeline, setting.latents(), setting.seed, folder / "logs", "names")
        parameters = add_lora(pipeline.unet, LORA_TARGETS, "names")
        parameters += add_lora(pipeline.text_encoder, _TEXT_TARGETS, "names")

        def predict(noisy, timesteps, target, rows):
            return training.predict(noisy, timesteps, training.prompts(rows, self.named)), target

        embeddings = learn_rare_tokens(pipeline, setting.seed)
        training.run(parameters, self.contexts, setting.rival_steps, predict, embeddings)
        save_lora(pipeline, folder, "names", with_text=True)
        save_file({"rare_tokens": embeddings.detach()[rare_token_rows(pipeline)]}, folder / "names" / _EMBEDDINGS)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_prompt_lora(setting, folder)
        return plain_sampler(pipeline, setting, name_concepts if self.named else lambda caption, _: caption)


def load_prompt_lora(setting: Setting, folder: Path) -> StableDiffusionPipeline:
    """The base with what a `PromptLora` learned."""
    if not (folder / "names").exists():
        raise FileNotFoundError(f"Run the row '{folder.name}' first: its LoRA is needed, and {folder} has none.")
    pipeline = load_base(setting)
    pipeline.load_lora_weights(folder / "names", weight_name="pytorch_lora_weights.safetensors", adapter_name="names")
    with torch.no_grad():
        embeddings = pipeline.text_encoder.get_input_embeddings().weight
        embeddings[rare_token_rows(pipeline)] = load_file(folder / "names" / _EMBEDDINGS)["rare_tokens"].to(device())
    return pipeline


@dataclass(frozen=True)
class LoraPerContext:
    """A LoRA for each context, trained on its images alone; compositions add those of several concepts."""

    def train(self, setting: Setting, folder: Path) -> None:
        latents, contexts = setting.latents(), quad.contexts()
        for name in contexts:
            pipeline = load_base(setting)
            training = LoraTraining(pipeline, latents, setting.seed, folder / "logs", name)

            def predict(noisy, timesteps, target, rows, training=training):
                return training.predict(noisy, timesteps, training.prompts(rows, name=False)), target

            parameters = add_lora(pipeline.unet, LORA_TARGETS, name)
            training.run(parameters, [name], setting.rival_steps // len(contexts), predict)
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


@dataclass(frozen=True)
class ComposableDiffusion:
    """Composes the predictions of a `PromptLora`: what each concept changes in the prediction is added up.

    Liu et al. 2022 (arXiv 2206.01714), equation 11, with the observational prompt in the unconditional one's place and
    weights of 1, so that a single concept is sampled as the LoRA samples it.

    Attributes:
        source: name of the row whose LoRA it uses.
    """

    source: str

    def train(self, setting: Setting, folder: Path) -> None:
        load_prompt_lora(setting, folder.parent / self.source)  # which must be there

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_prompt_lora(setting, folder.parent / self.source)
        single = plain_sampler(pipeline, setting, name_concepts)

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            if len(interventions) < 2:
                return single(captions, interventions, seed)
            return in_batches(
                lambda batch, generator: self._sample(pipeline, setting, batch, interventions, generator),
                captions,
                seed,
            )

        return sample

    @torch.no_grad()
    def _sample(self, pipeline, setting: Setting, captions: list[str], interventions, generator) -> np.ndarray:
        scheduler, size = pipeline.scheduler, pipeline.unet.config.sample_size
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
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(decoded, output_type="np")


@dataclass(frozen=True)
class ConceptSliders:
    """A LoRA per concept that turns the observational prompt's prediction into the concept's, and is then added.

    In the manner of Gandikota et al. 2023 (arXiv 2311.12092), equation 7, with a `PromptLora` as the model that is
    steered: it has that one's training and as much again.

    Attributes:
        source: name of the row whose LoRA it starts from.
    """

    source: str

    def train(self, setting: Setting, folder: Path) -> None:
        latents = setting.latents()
        for name in quad.CONCEPTS:
            pipeline = load_prompt_lora(setting, folder.parent / self.source)
            training = LoraTraining(pipeline, latents, setting.seed, folder / "logs", name)
            parameters = add_lora(pipeline.unet, LORA_TARGETS, name)

            def predict(noisy, timesteps, target, rows, pipeline=pipeline, training=training, name=name):
                captions = training.prompts(rows, name=False)
                with torch.no_grad():
                    pipeline.unet.set_adapters(["names"])
                    wanted = training.predict(noisy, timesteps, [name_concepts(x, [name]) for x in captions])
                pipeline.unet.set_adapters(["names", name])
                return training.predict(noisy, timesteps, captions), wanted

            training.run(parameters, ["obs", name], setting.rival_steps // len(quad.CONCEPTS), predict)
            save_lora(pipeline, folder, name)

    def load(self, setting: Setting, folder: Path) -> Sampler:
        pipeline = load_prompt_lora(setting, folder.parent / self.source)
        for name in quad.CONCEPTS:
            pipeline.load_lora_weights(folder / name, adapter_name=name)
        sample = plain_sampler(pipeline, setting, lambda caption, _: caption)

        def sample_with(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            pipeline.unet.set_adapters(["names", *interventions])
            return sample(captions, interventions, seed)

        return sample_with
