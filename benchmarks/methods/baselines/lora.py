"""Training and sampling of LoRAs, which all baselines share."""

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
from torch.utils.tensorboard import SummaryWriter
from tqdm.auto import tqdm

from diffusers_ctx.data import ContextBalancedSampler

from ..plain import load_plain, sample_prompts
from ..predicting import Prediction, Predictor
from ..setting import Sampler, Setting, device


RANK = 16
LEARNING_RATE = 2e-3
EMPTY_PROMPT_SHARE = 0.1
_EMBEDDINGS_RATE = 10  # times the LoRA's


def load_base(setting: Setting) -> StableDiffusionPipeline:
    pipeline = load_plain(setting.base)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False)
    return pipeline


def add_lora(module: torch.nn.Module, targets: list[str], adapter_name: str) -> list[torch.nn.Parameter]:
    """Adds a LoRA to a UNet or text encoder, makes it the one in use and returns its parameters."""
    module.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets), adapter_name
    )
    return [p for name, p in module.named_parameters() if f".{adapter_name}." in name]


@dataclass
class LoraTraining:
    """The usual loop of a text-to-image LoRA, on latents.

    Attributes:
        pipeline: the pipeline that learns.
        setting: that of all methods.
        log_dir: folder of TensorBoard's log of the loss.
        name: name of the LoRA in the log.
    """

    pipeline: StableDiffusionPipeline
    setting: Setting
    log_dir: Path
    name: str

    def __post_init__(self):
        self.latents = self.setting.latents()
        self.generator = torch.Generator().manual_seed(self.setting.seed)

    def run(
        self,
        parameters: list[torch.nn.Parameter],
        contexts: Sequence[str],
        steps: int,
        predict: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        embeddings: torch.nn.Parameter | None = None,
    ) -> None:
        """Minimizes the distance between the two tensors that `predict(noisy, timesteps, target, rows)` returns."""
        generator = self.generator
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if embeddings is not None:
            groups.append({"params": [embeddings], "lr": _EMBEDDINGS_RATE * LEARNING_RATE, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=1e-2)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
        scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        log = SummaryWriter(self.log_dir)
        batches = itertools.islice(self.batches(contexts), steps)
        for step, rows in enumerate(tqdm(batches, total=steps, desc="Training"), start=1):
            shape = (len(rows), *self.latents.mean.shape[2:])
            mean, std = self.latents.mean[0, rows], self.latents.std[0, rows]
            clean = mean + std * torch.randn(shape, generator=generator)
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

    def captions(self, rows: torch.Tensor) -> list[str]:
        """Captions; some are left empty."""
        drop = torch.rand(len(rows), generator=self.generator) < EMPTY_PROMPT_SHARE
        return ["" if dropped else self.latents.captions[row] for row, dropped in zip(rows.tolist(), drop)]

    def predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        text, _ = self.pipeline.encode_prompt(prompts, device(), 1, do_classifier_free_guidance=False)
        return self.pipeline.unet(noisy, timesteps, text).sample

    def batches(self, contexts: Sequence[str]) -> Iterator[torch.Tensor]:
        """Rows of images of these contexts, equally many of each, in batches without end."""
        rows = torch.tensor([row for row, name in enumerate(self.latents.contexts) if name in contexts])
        sampler = ContextBalancedSampler([self.latents.contexts[row] for row in rows], self.setting.seed)
        waiting: list[int] = []
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            waiting += list(sampler)
            while len(waiting) >= self.setting.train_batch_size:
                yield rows[waiting[: self.setting.train_batch_size]]
                waiting = waiting[self.setting.train_batch_size :]


def save_lora(pipeline: StableDiffusionPipeline, folder: Path, adapter_name: str, with_text: bool = False) -> None:
    def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return get_peft_model_state_dict(module, adapter_name=adapter_name)

    StableDiffusionPipeline.save_lora_weights(
        folder / adapter_name, state(pipeline.unet), state(pipeline.text_encoder) if with_text else None
    )


def switching_predictor(pipeline: StableDiffusionPipeline, switch: Callable[[Sequence[str]], None]) -> Predictor:
    """Predictions with the LoRAs that `switch` turns on for some interventions."""

    def predictor(captions: list[str], interventions: Sequence[str]) -> Prediction:
        text, _ = pipeline.encode_prompt(captions, device(), 1, do_classifier_free_guidance=False)

        def predict(latents: torch.Tensor, timestep: torch.Tensor | int) -> torch.Tensor:
            switch(interventions)  # at each step: predictions under other interventions may come between
            return pipeline.unet(latents, timestep, text).sample

        return predict

    return predictor


def plain_sampler(pipeline: StableDiffusionPipeline, setting: Setting, prompt: Callable[..., str]) -> Sampler:
    """Samples the prompts `prompt(caption, interventions)`."""

    def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
        prompts = [prompt(caption, interventions) for caption in captions]
        return sample_prompts(pipeline, prompts, seed, setting.num_inference_steps, setting.guidance_scale)

    return sample
