"""Pretrains a small Stable Diffusion of 64 × 64 pixels, such as those that the library ships.

On captioned folders (docs/beds/base.md has a recipe for the pictures of the test beds):

    python train_scripts/train_base.py autoencoder --output_dir runs/base --train_data_dir cats dogs
    python train_scripts/train_base.py unet --output_dir runs/base --train_data_dir cats dogs

On quad images of all contexts pooled, without --train_data_dir:

    python train_scripts/train_base.py autoencoder --output_dir runs/base
    python train_scripts/train_base.py unet --output_dir runs/base
    python train_scripts/train_base.py unet --output_dir runs/longer --pretrained_model_name_or_path runs/base
    python train_scripts/train_base.py unet --output_dir runs/epsilon --pretrained_model_name_or_path runs/base \
        --prediction_type epsilon

On a GPU, a larger batch, `--dataloader_num_workers` and `--allow_tf32` keep it busy.

Neither stage sees a context label: the autoencoder sees images, the UNet and the text encoder images and captions.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from base_models import (
    MAX_PROMPT_TOKENS,
    RESOLUTION,
    create_autoencoder,
    create_scheduler,
    create_text_encoder,
    create_unet,
    train_tokenizer,
)
from base_pictures import IMAGES_PER_DRAW, Folders, Pictures, Quad
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_ctx.paths import expand_home, local_path


EMPTY_PROMPT_SHARE = 0.1  # so that classifier-free guidance and empty prompts work


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("autoencoder", "unet"))
    parser.add_argument(
        "--output_dir", type=local_path, required=True, help="The pipeline's folder; `unet` reads the VAE in it."
    )
    parser.add_argument(
        "--train_data_dir",
        type=local_path,
        nargs="+",
        help="Folders of images with captions in metadata.csv; by default, images are quad's.",
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", help="How often each folder is drawn from; by default, all as often."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=expand_home,
        help="A pipeline made by this script, to train for longer.",
    )
    parser.add_argument(
        "--prediction_type",
        choices=("v_prediction", "epsilon"),
        default="v_prediction",
        help="For `unet`: `epsilon` has the noise schedule of Stable Diffusion 1.x.",
    )
    parser.add_argument(
        "--vae_channels",
        type=int,
        nargs="+",
        default=(16, 32, 64, 64),
        help="Each level but the first halves the picture.",
    )
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--unet_channels", type=int, nargs="+", default=(64, 112))
    parser.add_argument("--vocabulary", type=int, default=700, help="Tokens, of which 512 are letters.")
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that draw images of quad.")
    parser.add_argument("--allow_tf32", action="store_true", help="Allow TF32 on Ampere GPUs.")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--save_every", type=int, default=1000, help="Steps between savings.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def create_pictures(args: argparse.Namespace) -> Pictures:
    folders = args.train_data_dir
    if folders and args.train_batch_size > IMAGES_PER_DRAW:
        raise ValueError(f"`train_batch_size` is {args.train_batch_size}; lower it to {IMAGES_PER_DRAW} or less.")
    return Folders(folders, args.weights or [1.0] * len(folders)) if folders else Quad()


class Log:
    """Appends one JSON line every `every` steps: the mean of each metric since the last line."""

    def __init__(self, path: Path, every: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")
        self.every = every
        self.values: dict[str, list[torch.Tensor]] = {}
        self.start = time.time()

    def __call__(self, step: int, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())
        if step % self.every == 0:  # until then no GPU is waited for
            line = {name: round(torch.stack(series).mean().item(), 6) for name, series in self.values.items()}
            self.file.write(json.dumps({"step": step, "seconds": round(time.time() - self.start)} | line) + "\n")
            self.file.flush()
            self.values = {}


def train_autoencoder(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    if source := args.pretrained_model_name_or_path:
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32).train()
    else:
        vae = create_autoencoder(args.vae_channels, args.latent_channels)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    vae, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMAModel(accelerator.unwrap_model(vae).parameters(), decay=0.998, use_ema_warmup=True)
    log = Log(args.output_dir / "logs" / "autoencoder.jsonl", args.log_every)

    pictures = create_pictures(args)
    batches = pixel_batches(pictures, args.train_batch_size, args.seed, args.dataloader_num_workers)
    for step in tqdm(range(1, args.max_train_steps + 1), desc="autoencoder"):
        pixels = next(batches).to(accelerator.device, memory_format=torch.channels_last)
        posterior = accelerator.unwrap_model(vae).encode(pixels).latent_dist
        reconstruction = accelerator.unwrap_model(vae).decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, pixels)
        loss = mse + 0.2 * F.l1_loss(reconstruction, pixels) + 1e-6 * posterior.kl().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(accelerator.unwrap_model(vae).parameters())
        log(step, mse=mse, kl=posterior.kl().mean())
        if step % args.save_every == 0 or step == args.max_train_steps:
            averaged = copy.deepcopy(accelerator.unwrap_model(vae)).eval()
            ema.copy_to(averaged.parameters())
            averaged.register_to_config(scaling_factor=measure_scaling_factor(averaged, pictures, args.seed))
            averaged.half().save_pretrained(args.output_dir / "vae")


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, pictures: Pictures, seed: int) -> float:
    """One over the standard deviation of the latents, so that the UNet works on latents of unit variance."""
    pixels = next(pixel_batches(pictures, 512, seed)).to(vae.device)
    return 1 / vae.encode(pixels).latent_dist.sample().std().item()


def load_models(
    args: argparse.Namespace, captions: Sequence[str]
) -> tuple[AutoencoderKL, CLIPTokenizer, torch.nn.ModuleDict]:
    """The autoencoder, the tokenizer and what `unet` trains: new or, to go on with, those of an older pipeline."""
    source = args.pretrained_model_name_or_path
    if source is None:
        vae = AutoencoderKL.from_pretrained(args.output_dir, subfolder="vae", torch_dtype=torch.float32)
        tokenizer = train_tokenizer(captions, args.vocabulary)
        sample_size = RESOLUTION >> len(vae.config.block_out_channels) - 1
        unet = create_unet(args.unet_channels, vae.config.latent_channels, sample_size)
        text_encoder = create_text_encoder(tokenizer)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
        vae, tokenizer = pipeline.vae, pipeline.tokenizer
        unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    # one module, so that one optimizer, one EMA and one gradient norm cover both
    return vae.requires_grad_(False), tokenizer, torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: list[str]) -> torch.Tensor:
    """The text encoder's outputs (B, tokens, dim); each distinct caption is encoded once."""
    distinct, rows = np.unique(captions, return_inverse=True)
    padded = {"padding": "max_length", "max_length": MAX_PROMPT_TOKENS, "truncation": True}
    tokens = tokenizer(distinct.tolist(), **padded, return_tensors="pt")
    text = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
    return text[torch.from_numpy(rows).to(text.device)]


def drop_prompts(captions: list[str], rng: np.random.Generator) -> list[str]:
    return ["" if drop else caption for caption, drop in zip(captions, rng.random(len(captions)) < EMPTY_PROMPT_SHARE)]


def pixel_batches(pictures: Pictures, batch_size: int, seed: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
    """Endless batches of images (B, 3, 64, 64) in [-1, 1]."""
    for images, _ in pictures.draws(seed, num_workers):
        for start in range(0, len(images) - batch_size + 1, batch_size):
            yield images[start : start + batch_size].permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def latent_batches(
    pictures: Pictures, vae: AutoencoderKL, batch_size: int, seed: int, num_workers: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches: latents (B, C, 8, 8) and captions."""
    for images, captions in pictures.draws(seed, num_workers):
        pixels = images.permute(0, 3, 1, 2)
        encoded = [vae.encode(chunk.to(vae.device) / 127.5 - 1).latent_dist.sample() for chunk in pixels.split(128)]
        latents = torch.cat(encoded) * vae.config.scaling_factor
        for _ in range(pictures.passes):
            for rows in torch.randperm(len(latents))[: len(latents) // batch_size * batch_size].split(batch_size):
                yield latents[rows.to(latents.device)], [captions[row] for row in rows]


def train_unet(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    pictures = create_pictures(args)
    scheduler = create_scheduler(args.prediction_type)
    vae, tokenizer, model = load_models(args, pictures.captions)
    vae, model = vae.to(accelerator.device), model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    ema = EMAModel(model.parameters(), decay=0.999, foreach=True)
    log = Log(args.output_dir / "logs" / "unet.jsonl", args.log_every)
    rng = np.random.default_rng(args.seed)

    batches = latent_batches(pictures, vae, args.train_batch_size, args.seed + 1, args.dataloader_num_workers)
    for step in tqdm(range(1, args.max_train_steps + 1), desc="unet"):
        latents, captions = next(batches)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        text = encode_prompts(tokenizer, model["text_encoder"], drop_prompts(captions, rng))
        prediction = model["unet"](noisy, timesteps, text).sample
        epsilon = args.prediction_type == "epsilon"
        loss = F.mse_loss(prediction, noise if epsilon else scheduler.get_velocity(latents, noise, timesteps))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        log(step, loss=loss)
        if step % args.save_every == 0 or step == args.max_train_steps:
            save(args.output_dir, ema, vae, tokenizer, model, scheduler)


def save(
    folder: Path,
    ema: EMAModel,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    model: torch.nn.ModuleDict,
    scheduler: DDIMScheduler,
) -> None:
    """Saves the averaged weights as a pipeline: UNet and VAE in half precision.

    The text encoder stays in single precision: transformers loads a model in the type that it was saved in, where
    diffusers loads everything in single precision.
    """
    averaged = copy.deepcopy(model).eval()
    ema.copy_to(averaged.parameters())
    StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        unet=averaged["unet"].half(),
        text_encoder=averaged["text_encoder"],
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


if __name__ == "__main__":
    arguments = parse_args()
    set_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = arguments.allow_tf32
    {"autoencoder": train_autoencoder, "unet": train_unet}[arguments.stage](arguments)
