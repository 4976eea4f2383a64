"""Pretrains the small Stable Diffusion that the library ships, on quad images of all contexts pooled.

    python train_scripts/train_quad_base.py autoencoder --output_dir runs/base
    python train_scripts/train_quad_base.py unet --output_dir runs/base
    python train_scripts/train_quad_base.py unet --output_dir runs/longer --pretrained_model_name_or_path runs/base
    python train_scripts/train_quad_base.py unet --output_dir runs/epsilon --pretrained_model_name_or_path runs/base \
        --prediction_type epsilon

On a GPU, a larger batch, `--dataloader_num_workers` and `--allow_tf32` keep it busy.

Neither stage sees a context label: the autoencoder sees images, the UNet and the text encoder images and captions.
Every step draws fresh images from seeds below `quad.FIRST_HELD_OUT_SEED`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ctx.data import quad
from diffusers_ctx.paths import expand_home, local_path


IMAGES_PER_DRAW = 512  # of each context, drawn at once
PASSES_PER_DRAW = 3  # of the UNet over the same images, each time with other noise
MAX_PROMPT_TOKENS = 24
EMPTY_PROMPT_SHARE = 0.1  # so that classifier-free guidance and empty prompts work


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("autoencoder", "unet"))
    parser.add_argument(
        "--output_dir", type=local_path, required=True, help="The pipeline's folder; `unet` reads the VAE in it."
    )
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=expand_home,
        help="For `unet`: a pipeline made by this script, to train for longer.",
    )
    parser.add_argument(
        "--prediction_type",
        choices=("v_prediction", "epsilon"),
        default="v_prediction",
        help="For `unet`: `epsilon` has the noise schedule of Stable Diffusion 1.x.",
    )
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_warmup_steps", type=int, default=200)
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that draw images.")
    parser.add_argument("--allow_tf32", action="store_true", help="Allow TF32 on Ampere GPUs.")
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class PooledDraws(IterableDataset):
    """Endless draws of shuffled images of all contexts of the dependent variant, with their captions.

    Args:
        seed: of the draws; each process of a data loader has its own.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        worker = get_worker_info()
        rng = np.random.default_rng(self.seed if worker is None else (self.seed, worker.id))
        while True:
            samples = [
                quad.generate(names, IMAGES_PER_DRAW, seed=int(rng.integers(quad.FIRST_HELD_OUT_SEED)))
                for names in quad.contexts().values()
            ]
            images = np.concatenate([sample.images for sample in samples])
            captions = [caption for sample in samples for caption in sample.captions]
            order = rng.permutation(len(images))
            yield images[order], [captions[index] for index in order]


def pooled_draws(seed: int, num_workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """As `PooledDraws`, with images as tensors."""
    yield from DataLoader(PooledDraws(seed), batch_size=None, num_workers=num_workers)


def pooled_batches(batch_size: int, seed: int, num_workers: int = 0) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches: images (B, 3, 64, 64) in [-1, 1] and captions."""
    for images, captions in pooled_draws(seed, num_workers):
        for start in range(0, len(images) - batch_size + 1, batch_size):
            pixels = images[start : start + batch_size].permute(0, 3, 1, 2)
            yield pixels / 127.5 - 1, captions[start : start + batch_size]


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
    vae = AutoencoderKL(
        sample_size=quad.RESOLUTION,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    vae, optimizer = accelerator.prepare(vae, optimizer)
    ema = EMAModel(accelerator.unwrap_model(vae).parameters(), decay=0.998, use_ema_warmup=True)
    log = Log(args.output_dir / "logs" / "autoencoder.jsonl", args.log_every)

    batches = pooled_batches(args.train_batch_size, args.seed, args.dataloader_num_workers)
    for step in tqdm(range(1, args.max_train_steps + 1), desc="autoencoder"):
        pixels = next(batches)[0].to(accelerator.device, memory_format=torch.channels_last)
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

    vae = accelerator.unwrap_model(vae)
    ema.copy_to(vae.parameters())
    vae.register_to_config(scaling_factor=measure_scaling_factor(vae, args.seed))
    vae.to(torch.float16).save_pretrained(args.output_dir / "vae")


@torch.no_grad()
def measure_scaling_factor(vae: AutoencoderKL, seed: int) -> float:
    """One over the standard deviation of the latents, so that the UNet works on latents of unit variance."""
    pixels = next(pooled_batches(512, seed))[0].to(vae.device)
    return 1 / vae.encode(pixels).latent_dist.sample().std().item()


def train_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learned on quad's captions; other words fall into their letters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=special, end_of_word_suffix="</w>"
    )
    captions = [f"a picture of {name}" for name in ("a circle", "a square", "a triangle", "an ellipse")]
    words = [word for caption in captions for word in caption.split()]
    bpe.train_from_iterator(words * 2, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in learned["merges"]]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens + special))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[tuple(merge) for merge in learned["merges"]], model_max_length=MAX_PROMPT_TOKENS
    )


def load_models(args: argparse.Namespace) -> tuple[AutoencoderKL, CLIPTokenizer, torch.nn.ModuleDict]:
    """The autoencoder, the tokenizer and what `unet` trains: new or, to go on with, those of an older pipeline."""
    source = args.pretrained_model_name_or_path
    if source is None:
        vae = AutoencoderKL.from_pretrained(args.output_dir, subfolder="vae")
        tokenizer = train_tokenizer()
        unet, text_encoder = create_unet(quad.RESOLUTION // 8), create_text_encoder(tokenizer)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
        vae, tokenizer = pipeline.vae, pipeline.tokenizer
        unet, text_encoder = pipeline.unet.train(), pipeline.text_encoder.train()
    # one module, so that one optimizer, one EMA and one gradient norm cover both
    return vae.requires_grad_(False), tokenizer, torch.nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def create_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_PROMPT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def create_unet(latent_size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=latent_size,
        block_out_channels=(64, 112),
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,
    )


def create_scheduler(prediction_type: str) -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x, for v-prediction with zero terminal SNR.

    With that, sampling starts where training ended (Lin et al., 2305.08891).
    """
    if prediction_type == "v_prediction":
        options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    else:
        options = {"steps_offset": 1}
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        **options,
    )


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: list[str]) -> torch.Tensor:
    """The text encoder's outputs (B, tokens, dim); each distinct caption is encoded once."""
    distinct, rows = np.unique(captions, return_inverse=True)
    tokens = tokenizer(distinct.tolist(), padding="max_length", max_length=MAX_PROMPT_TOKENS, return_tensors="pt")
    text = text_encoder(tokens.input_ids.to(text_encoder.device))[0]
    return text[torch.from_numpy(rows).to(text.device)]


def drop_prompts(captions: list[str], rng: np.random.Generator) -> list[str]:
    return ["" if drop else caption for caption, drop in zip(captions, rng.random(len(captions)) < EMPTY_PROMPT_SHARE)]


@torch.no_grad()
def encoded_batches(
    vae: AutoencoderKL, batch_size: int, seed: int, num_workers: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Endless batches: latents (B, 4, 8, 8) and captions. Encoding costs time, so that each draw is used again."""
    for images, captions in pooled_draws(seed, num_workers):
        pixels = images.permute(0, 3, 1, 2)
        encoded = [vae.encode(chunk.to(vae.device) / 127.5 - 1).latent_dist.sample() for chunk in pixels.split(512)]
        latents = torch.cat(encoded) * vae.config.scaling_factor
        for _ in range(PASSES_PER_DRAW):
            for rows in torch.randperm(len(latents))[: len(latents) // batch_size * batch_size].split(batch_size):
                yield latents[rows.to(latents.device)], [captions[row] for row in rows]


def train_unet(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    scheduler = create_scheduler(args.prediction_type)
    vae, tokenizer, model = load_models(args)
    vae, model = vae.to(accelerator.device), model.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, args.max_train_steps)
    ema = EMAModel(model.parameters(), decay=0.999, foreach=True)
    log = Log(args.output_dir / "logs" / "unet.jsonl", args.log_every)
    rng = np.random.default_rng(args.seed)

    batches = encoded_batches(vae, args.train_batch_size, args.seed + 1, args.dataloader_num_workers)
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

    ema.copy_to(model.parameters())
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=model["unet"],
        text_encoder=model["text_encoder"].eval(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # the text encoder stays in single precision: transformers loads a model in the type that it was saved in, where
    # diffusers loads everything in single precision
    pipeline.unet.half()
    pipeline.vae.half()
    pipeline.save_pretrained(args.output_dir)


if __name__ == "__main__":
    arguments = parse_args()
    set_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = arguments.allow_tf32
    {"autoencoder": train_autoencoder, "unet": train_unet}[arguments.stage](arguments)
