"""Images encoded once, before training: what the diffusion model and the posterior both see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...adapter.image_features import ImageFeatures
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
        geometry: (V, n, 6), each image's original height and width, top and left of its crop in the resized image,
            and height and width of the crop, in pixels.
        features: (V, n, F, h', w'), what the posterior sees in the place of latents, if anything.
    """

    mean: torch.Tensor
    std: torch.Tensor
    masks: torch.Tensor
    contexts: list[str]
    captions: list[str]
    geometry: torch.Tensor
    features: torch.Tensor | None = None

    @property
    def seen(self) -> torch.Tensor:
        """What the posterior sees, (V, n, ...)."""
        return self.mean if self.features is None else self.features

    def __len__(self) -> int:
        return self.mean.shape[1]

    def __getitem__(self, index: int) -> dict:
        return {"index": index, "mask": self.masks[index], "caption": self.captions[index]}

    def draw(self, indices: torch.Tensor, noise: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) of some rows, from standard normal `noise` and uniform numbers `flip` (B,)."""
        views = self._views(flip)
        return self.mean[views, indices] + self.std[views, indices] * noise

    def geometry_of(self, indices: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """The geometry (B, 6) of the views that `draw` takes."""
        return self.geometry[self._views(flip), indices]

    def features_of(self, indices: torch.Tensor, flip: torch.Tensor) -> torch.Tensor | None:
        """The features (B, F, h', w') of the views that `draw` takes; `None` where the posterior sees latents."""
        return None if self.features is None else self.features[self._views(flip), indices]

    def _views(self, flip: torch.Tensor) -> torch.Tensor:
        return (flip * len(self.mean)).long()


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
        size = (self.resolution, self.resolution)
        square = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS, centering=self._place(index))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1

    def geometry(self, image: Image.Image, index: int, flipped: bool = False) -> torch.Tensor:
        """The image's row (6,) of `ContextLatents.geometry`; of the mirror image if `flipped`."""
        scale = self.resolution / min(image.size)
        left, top = (place * (side * scale - self.resolution) for place, side in zip(self._place(index), image.size))
        if flipped:
            left = image.width * scale - self.resolution - left
        return torch.tensor([image.height, image.width, round(top), round(left), self.resolution, self.resolution])

    def _place(self, index: int) -> tuple[float, float]:
        """Where the crop lies from left to right and from top to bottom, in [0, 1]."""
        if self.center_crop:
            return 0.5, 0.5
        left, top = np.random.default_rng((self.seed, index)).random(2)
        return left, top


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations (B, C, h, w) of the scaled latents of pixels (B, 3, H, W); on the CPU."""
    posterior, scale = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist, vae.config.scaling_factor
    return posterior.mean.float().cpu() * scale, posterior.std.float().cpu() * scale


def encode_images(
    vae: AutoencoderKL,
    dataset: datasets.Dataset,
    masks: torch.Tensor,
    transform: ImageTransform,
    random_flip: bool = False,
    batch_size: int = 16,
    show_progress: bool = True,
    cache_dir: Path | None = None,
    wait_for_other_process: bool = False,
    image_features: ImageFeatures | None = None,
    num_workers: int = 0,
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
        cache_dir: folder where latents are kept and found again, by the content of the images' files, the VAE, the
            transform and what makes the features.
        wait_for_other_process: whether to wait for the file that another process here writes to `cache_dir`.
        image_features: what makes the features that the posterior sees, if it does not see latents.
        num_workers: processes that read and transform images; with none, this one does.

    Raises:
        OSError: if `cache_dir` cannot take what is encoded; see [`~latent_cache.cached`].
    """

    def encode() -> dict[str, torch.Tensor]:
        images = _ImageViews(dataset, transform, [False, True] if random_flip else [False])
        # a generator of its own: a loader draws from the global one, with or without workers
        loader = DataLoader(images, batch_size, num_workers=num_workers, generator=torch.Generator())
        return _encode(vae, tqdm(loader, desc="Encoding images", disable=not show_progress), image_features)

    if cache_dir is None:
        latents = encode()
    else:
        # with the names of what is kept: other versions of this function kept other things
        settings = [_KEPT, vars(transform), random_flip, vae.config.scaling_factor]
        if image_features is not None:
            settings.append(image_features.digest())
        key = content_key(vae, dataset, *settings)
        size = 4 * len(dataset) * (2 if random_flip else 1) * _numbers(vae, transform.resolution, image_features)
        latents = cached(cache_dir, key, encode, wait_for_other_process, size)
    return ContextLatents(masks=masks, contexts=list(dataset["context"]), captions=list(dataset["text"]), **latents)


def _numbers(vae: AutoencoderKL, resolution: int, image_features: ImageFeatures | None) -> int:
    """How many are kept of a view of an image: mean, standard deviation and features."""
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    numbers = 2 * vae.config.latent_channels * side**2
    return numbers + (image_features.channels * image_features.size(side) ** 2 if image_features else 0)


_KEPT = ("mean", "std", "geometry")


class _ImageViews(Dataset):
    """Pixels (V, 3, H, W) and geometry (V, 6) of images, of the mirror image in views that `flips` marks."""

    def __init__(self, dataset: datasets.Dataset, transform: ImageTransform, flips: Sequence[bool]):
        self.dataset = dataset
        self.transform = transform
        self.flips = flips

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.dataset[row]["image"]
        pixels = self.transform(image, row)
        views = torch.stack([pixels.flip(-1) if flip else pixels for flip in self.flips])
        return views, torch.stack([self.transform.geometry(image, row, flip) for flip in self.flips])


@torch.no_grad()
def _encode(
    vae: AutoencoderKL,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    image_features: ImageFeatures | None,
) -> dict[str, torch.Tensor]:
    """What of `ContextLatents` is `_KEPT`, and the features."""
    means, stds, geometries, features = [], [], [], []
    for pixels, geometry in batches:
        views = pixels.transpose(0, 1)
        geometries.append(geometry.transpose(0, 1))
        inputs = views.flatten(0, 1)
        mean, std = encode_pixels(vae, inputs)
        means.append(mean.unflatten(0, views.shape[:2]))
        stds.append(std.unflatten(0, views.shape[:2]))
        if image_features is not None:
            made = image_features(inputs.to(vae.device), mean.to(vae.device))
            features.append(made.cpu().unflatten(0, views.shape[:2]))
    kept = {
        "mean": torch.cat(means, dim=1),
        "std": torch.cat(stds, dim=1),
        "geometry": torch.cat(geometries, dim=1),
    }
    return kept | ({"features": torch.cat(features, dim=1)} if features else {})
