"""Images encoded once, before training: what the diffusion model and the posterior both see."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .latent_cache import cached, content_key


@dataclass
class ContextLatents(Dataset):
    """Latents of images in contexts; row `i` is an image, with all that a training step needs of it.

    Attributes:
        mean: (V, n, C, h, w), means of the VAE's posterior, scaled; V is 2 where images may be flipped, else 1.
        std: the same, standard deviations.
        masks: (n, K) intervention masks.
        contexts: n names of contexts.
        captions: n captions.
    """

    mean: torch.Tensor
    std: torch.Tensor
    masks: torch.Tensor
    contexts: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return self.mean.shape[1]

    def __getitem__(self, index: int) -> dict:
        return {"index": index, "mask": self.masks[index], "caption": self.captions[index]}

    def draw(self, indices: torch.Tensor, noise: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of some rows, from standard normal `noise` and uniform numbers `flip` (B,)."""
        views = (flip * len(self.mean)).long()
        return self.mean[views, indices] + self.std[views, indices] * noise


class ImageTransform:
    """Resizes an image's shorter side to `resolution` and crops a square, in the centre or at a random place.

    The place is drawn once per image, from its index, so that it does not depend on the order of reading.
    """

    def __init__(self, resolution: int, center_crop: bool, seed: int):
        self.resolution = resolution
        self.center_crop = center_crop
        self.seed = seed

    def __call__(self, image: Image.Image, index: int) -> torch.Tensor:
        """Pixels (3, resolution, resolution) in [-1, 1]."""
        place = (0.5, 0.5) if self.center_crop else np.random.default_rng((self.seed, index)).random(2)
        size = (self.resolution, self.resolution)
        square = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS, centering=tuple(place))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1


def encode_images(
    vae: AutoencoderKL,
    dataset: datasets.Dataset,
    masks: torch.Tensor,
    transform: ImageTransform,
    random_flip: bool = False,
    batch_size: int = 16,
    show_progress: bool = True,
    cache_dir: Path | None = None,
) -> ContextLatents:
    """Encodes a dataset with the columns `image`, `context` and `text`.

    Args:
        vae: the pretrained autoencoder, on the device to encode on.
        dataset: the images, see [`~data.load_context_dataset`].
        masks: (n, K) intervention masks of its rows.
        transform: what becomes of an image first.
        random_flip: whether to encode each image's mirror image too.
        batch_size: images encoded at once.
        show_progress: whether to show a progress bar.
        cache_dir: folder where latents are kept and found again, by the content of the images' files, the VAE and the
            transform.
    """

    def encode() -> dict[str, torch.Tensor]:
        return _encode(vae, dataset, transform, random_flip, batch_size, show_progress)

    if cache_dir is None:
        latents = encode()
    else:
        key = content_key(vae, dataset, vars(transform), random_flip, vae.config.scaling_factor)
        latents = cached(cache_dir, key, encode)
    return ContextLatents(latents["mean"], latents["std"], masks, list(dataset["context"]), list(dataset["text"]))


@torch.no_grad()
def _encode(
    vae: AutoencoderKL,
    dataset: datasets.Dataset,
    transform: ImageTransform,
    random_flip: bool,
    batch_size: int,
    show_progress: bool,
) -> dict[str, torch.Tensor]:
    """`mean` and `std` as in `ContextLatents`."""
    means, stds = [], []
    for start in tqdm(range(0, len(dataset), batch_size), desc="Encoding images", disable=not show_progress):
        rows = range(start, min(start + batch_size, len(dataset)))
        pixels = torch.stack([transform(dataset[row]["image"], row) for row in rows])
        views = torch.stack([pixels, pixels.flip(-1)] if random_flip else [pixels])
        posterior = vae.encode(views.flatten(0, 1).to(vae.device, vae.dtype)).latent_dist
        means.append(posterior.mean.float().cpu().unflatten(0, views.shape[:2]))
        stds.append(posterior.std.float().cpu().unflatten(0, views.shape[:2]))
    scale = vae.config.scaling_factor
    return {"mean": torch.cat(means, dim=1) * scale, "std": torch.cat(stds, dim=1) * scale}
