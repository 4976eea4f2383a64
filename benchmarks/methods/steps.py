"""Trainings that run a step at a time: context adapters, and a LoRA as in diffusers' own script."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch.utils.data import DataLoader

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import native_resolution
from diffusers_ctx.adapter.backbones import UNetBackbone
from diffusers_ctx.data import context_mask, load_context_dataset, quad
from diffusers_ctx.training import TrainingConfig
from diffusers_ctx.training.concepts.module import create_context_module
from diffusers_ctx.training.config import ContextConfig, DataConfig, ModelConfig, OptimizationConfig, OutputConfig
from diffusers_ctx.training.diffusion.stage import DiffusionStage
from diffusers_ctx.training.diffusion.trainable import prepare_backbone
from diffusers_ctx.training.encoding.batch import Batch
from diffusers_ctx.training.encoding.images import ImageTransform
from diffusers_ctx.training.encoding.latents import ContextLatents, LatentBatches, encode_images
from diffusers_ctx.training.run.accelerator import create_accelerator
from diffusers_ctx.training.run.keyed_noise import KeyedNoise

from .setting import device


_ENDLESS = 1_000_000  # steps of a run that is never finished


@dataclass(frozen=True)
class StepCase:
    """A training whose steps are measured.

    Attributes:
        mode: mode of a context adapter; `None` is a plain LoRA.
        first_share: whether to measure the steps before `unfreeze_after`, in which the backbone does not learn.
        cached: whether latents were encoded before training; otherwise each step encodes them.
    """

    mode: str | None
    first_share: bool = False
    cached: bool = True


@dataclass
class CachedLatents(ContextLatents):
    """Latents that were encoded before training."""

    def draw(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A draw (B, C, h, w) from the VAE's posteriors of some rows (B,), at noise (B, C, h, w)."""
        return self.mean[0, rows] + self.std[0, rows] * noise


@dataclass(kw_only=True)  # after fields that have defaults
class EncodedLatents(CachedLatents):
    """Latents that are encoded whenever they are drawn.

    Images are in memory as tensors: reading them, which data loaders can do in other processes, takes no time here.

    Attributes:
        vae: the autoencoder, on its device.
        pixels: (n, 3, H, W) in [-1, 1].
    """

    vae: AutoencoderKL
    pixels: torch.Tensor

    def batch(self, rows: torch.Tensor, random: KeyedNoise) -> Batch:
        latents = self.draw(rows, random.normal(len(rows), *self.mean.shape[2:]))
        return self.mean_batch(rows)._replace(latents=latents)

    @torch.no_grad()
    def draw(self, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        pixels = self.pixels[rows.cpu()].to(self.vae.device)
        posterior = self.vae.encode(pixels).latent_dist
        return (posterior.mean + posterior.std * noise.to(pixels)) * self.vae.config.scaling_factor


@dataclass(frozen=True)
class StepSetting:
    """Options that all cases share.

    Attributes:
        base: local folder or Hub id of a Stable Diffusion.
        train_batch_size: images per step.
        rank: rank of the LoRAs.
        work_dir: folder of the images.
        mixed_precision: `no`, `fp16` or `bf16`.
        allow_tf32: whether a GPU may multiply in TF32.
    """

    base: str
    train_batch_size: int
    rank: int
    work_dir: Path
    mixed_precision: str = "no"
    allow_tf32: bool = False

    def load_pipeline(self) -> ComposablePipeline:
        return ComposablePipeline.from_pretrained(self.base, safety_checker=None, requires_safety_checker=False)

    def config(self, case: StepCase) -> TrainingConfig:
        return TrainingConfig(
            ModelConfig(
                self.base,
                mode=case.mode or "lora",
                rank=self.rank,
                unfreeze_after=0.5 if case.first_share else 0.0,
            ),
            DataConfig(train_data_dir=str(self._data_dir), concepts=list(quad.CONCEPTS), resolution=self.resolution),
            ContextConfig(posterior_encoder="vae"),  # so that images can be encoded in each step
            OptimizationConfig(
                train_batch_size=self.train_batch_size,
                max_train_steps=_ENDLESS,
                lr_warmup_steps=0,
                mixed_precision=self.mixed_precision,
                allow_tf32=self.allow_tf32,
            ),
            OutputConfig(output_dir=str(self.work_dir / "adapter"), report_to="none"),
        )

    def latents(self, vae: AutoencoderKL, cached: bool) -> CachedLatents:
        """All images' latents; those that are not cached are encoded by `vae`."""
        encoded = vars(self._cached)
        return CachedLatents(**encoded) if cached else EncodedLatents(**encoded, vae=vae, pixels=self._pixels)

    @property
    def resolution(self) -> int:
        """Height and width of the images, in pixels."""
        return self._pixels.shape[-1]

    @cached_property
    def _data_dir(self) -> Path:
        """Folder of images: an epoch has seven batches, one image of each context for each place in a batch."""
        return quad.write_folders(self.work_dir / "data", self.train_batch_size, seed=0)

    @cached_property
    def _dataset(self) -> datasets.Dataset:
        return load_context_dataset(self._data_dir, concepts=list(quad.CONCEPTS))

    @cached_property
    def _transform(self) -> ImageTransform:
        pipeline = self.load_pipeline()
        return ImageTransform(native_resolution(pipeline), center_crop=True, seed=0)

    @cached_property
    def _pixels(self) -> torch.Tensor:
        return torch.stack([self._transform(row["image"], index) for index, row in enumerate(self._dataset)])

    @cached_property
    def _cached(self) -> ContextLatents:
        vae = self.load_pipeline().vae.requires_grad_(False).to(device())
        masks = context_mask(list(self._dataset["context"]), list(quad.CONCEPTS))
        # one at a time, so that no step takes less memory than this
        return encode_images(vae, self._dataset, masks, self._transform, batch_size=1, show_progress=False)


class AdapterRun:
    """A context adapter's training, a step at a time.

    Concepts are not learned first: a step takes as long with any.

    Args:
        setting: options that all cases share.
        case: its mode and latents.
    """

    def __init__(self, setting: StepSetting, case: StepCase):
        config = setting.config(case)
        options = config.optimization
        self.accelerator = create_accelerator(config)
        set_seed(options.seed)
        self.pipeline = setting.load_pipeline()
        module = create_context_module(config, self.pipeline, list(quad.CONCEPTS), None, setting.resolution)
        prepare_backbone(self.pipeline, module, config.model, self.accelerator)
        latents = setting.latents(self.pipeline.vae, case.cached)
        batches = LatentBatches(latents, options.train_batch_size, options.seed)
        self.stage = DiffusionStage(self.accelerator, self.pipeline, batches, config, _ENDLESS, options.learning_rate)
        self._steps = self.stage.steps()

    @property
    def learning(self) -> list[torch.nn.Parameter]:
        return self.stage.parameters

    def step(self) -> None:
        next(self._steps)


class PlainLora:
    """A LoRA's training as in diffusers' `train_text_to_image_lora.py`, a step at a time.

    Args:
        setting: options that all cases share.
        case: its latents.
    """

    def __init__(self, setting: StepSetting, case: StepCase):
        self.options = setting.config(case).optimization
        self.accelerator = create_accelerator(setting.config(case))
        self.pipeline = setting.load_pipeline().to(self.accelerator.device)
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(setting.mixed_precision, torch.float32)
        for module in (self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.unet):
            module.requires_grad_(False)
        for module in (self.pipeline.text_encoder, self.pipeline.unet):
            module.to(torch.empty(0, device=self.accelerator.device, dtype=dtype))  # of a bare dtype diffusers warns
        self.pipeline.unet.add_adapter(
            LoraConfig(
                r=setting.rank,
                lora_alpha=setting.rank,
                init_lora_weights="gaussian",
                target_modules=list(UNetBackbone.lora_targets),
            )
        )
        cast_training_params(self.pipeline.unet, torch.float32)
        self.learning = [p for p in self.pipeline.unet.parameters() if p.requires_grad]
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        latents = setting.latents(self.pipeline.vae, case.cached)
        device = self.accelerator.device
        self.latents = replace(latents, mean=latents.mean.to(device), std=latents.std.to(device))
        self._prepare()
        self.unet.train()
        self.batches = self._endless_batches()

    def _prepare(self) -> None:
        """Optimizer, schedule and data, handed to Accelerate."""
        options = self.options
        optimizer = torch.optim.AdamW(
            self.learning,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
        )
        images: Any = [{"index": row, "caption": caption} for row, caption in enumerate(self.latents.captions)]
        loader = DataLoader(images, shuffle=True, batch_size=options.train_batch_size, drop_last=True)
        schedule = get_scheduler(options.lr_scheduler, optimizer)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            self.pipeline.unet, optimizer, loader, schedule
        )

    def _endless_batches(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        batch, accelerator = next(self.batches), self.accelerator
        with accelerator.accumulate(self.unet):
            loss = self._loss(batch["index"], batch["caption"])
            accelerator.gather(loss.repeat(len(batch["index"]))).mean().item()  # which the script logs
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(self.learning, self.options.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()

    def _loss(self, indices: torch.Tensor, captions: list[str]) -> torch.Tensor:
        size, device, scheduler = len(indices), self.accelerator.device, self.scheduler
        shape = (size, *self.latents.mean.shape[2:])
        latents = self.latents.draw(indices, torch.randn(shape, device=device))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (size,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        text = self.pipeline.text_encoder(self._tokenize(captions).to(device), return_dict=False)[0]
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = self.unet(noisy, timesteps, text, return_dict=False)[0]
        return F.mse_loss(prediction.float(), target.float())

    def _tokenize(self, captions: list[str]) -> torch.Tensor:
        tokenizer = self.pipeline.tokenizer
        return tokenizer(
            captions,
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids


def create_run(setting: StepSetting, case: StepCase) -> AdapterRun | PlainLora:
    return (PlainLora if case.mode is None else AdapterRun)(setting, case)
