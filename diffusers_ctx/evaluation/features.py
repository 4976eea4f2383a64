"""Features of images by pretrained models, for the kernel distance."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..autoencoding import decode_latents, encode_pixels
from ..paths import local_or_hub, local_path
from .images import to_uint8


Features = Callable[[np.ndarray], np.ndarray]


def latent_features(vae: AutoencoderKL, batch_size: int = 16) -> Features:
    """Maps images (n, H, W, 3) uint8 to the means of their latents, flattened (n, C h w) float32, unscaled.

    Args:
        vae: the autoencoder, on the device to work on.
        batch_size: images encoded at once.
    """
    scale = vae.config.scaling_factor
    return _in_batches(lambda images: (_scaled_latents(vae, images) / scale).flatten(1), batch_size)


def clip_features(
    name_or_path: str,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    cache_dir: str | os.PathLike | None = None,
) -> Features:
    """Maps images (n, H, W, 3) uint8 to the embeddings (n, d) float32 of a CLIP model.

    Args:
        name_or_path: folder or Hub id of the model and its image processor.
        device: device to work on.
        batch_size: images embedded at once.
        cache_dir: where downloads are kept.

    Raises:
        OSError: if there is no such model.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    name_or_path, cache_dir = local_or_hub(name_or_path), local_path(cache_dir) if cache_dir else None
    model = CLIPVisionModelWithProjection.from_pretrained(name_or_path, cache_dir=cache_dir).to(device)
    processor = CLIPImageProcessor.from_pretrained(name_or_path, cache_dir=cache_dir)

    def embed(images: np.ndarray) -> torch.Tensor:
        return model(**processor(list(images), return_tensors="pt").to(device)).image_embeds

    return _in_batches(embed, batch_size)


def autoencode(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """An autoencoder's reconstruction of images (n, H, W, 3) uint8."""
    decoded = decode_latents(vae, _scaled_latents(vae, images)).float().cpu().permute(0, 2, 3, 1)
    return to_uint8((decoded / 2 + 0.5).clamp(0, 1).numpy())


def _scaled_latents(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    mean, _ = encode_pixels(vae, torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
    return mean


def _in_batches(extract: Callable[[np.ndarray], torch.Tensor], batch_size: int) -> Features:
    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return np.concatenate([extract(batch).float().cpu().numpy() for batch in batches])

    return features
