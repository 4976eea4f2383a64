"""Images encoded once, before training: latents, and features that the posterior reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...adapter.image_features import ImageFeatures
from ...autoencoding import encode_pixels, latent_size
from ...data import ContextBalancedSampler
from ..run.keyed_noise import KeyedNoise
from .batch import Batch, noise_of_batch
from .images import ImageTransform
from .latent_cache import cached, content_key


@dataclass
class ContextLatents:
    """Latents of images in contexts; row `i` is an image.

    Attributes:
        mean: (V, n, C, h, w), means of the VAE's posterior, scaled; V is 2 where images may be flipped, else 1.
        std: the same, standard deviations.
        masks: (n, K), intervention masks.
        contexts: n names of contexts.
        captions: n captions.
        geometry: (V, n, 6), see [`Batch`].
        features: (V, n, F, h', w'), what the posterior reads instead of latents, if anything.
    """

    mean: torch.Tensor
    std: torch.Tensor
    masks: torch.Tensor
    contexts: list[str]
    captions: list[str]
    geometry: torch.Tensor
    features: torch.Tensor | None = None

    @property
    def posterior_input(self) -> torch.Tensor:
        """What the posterior reads, (V, n, ...)."""
        return self.mean if self.features is None else self.features

    def __len__(self) -> int:
        return self.mean.shape[1]

    def select(self, rows: Sequence[int]) -> ContextLatents:
        """Those of some rows."""
        features = None if self.features is None else self.features[:, rows]
        contexts, captions = [self.contexts[row] for row in rows], [self.captions[row] for row in rows]
        kept = (self.mean[:, rows], self.std[:, rows], self.masks[rows])
        return ContextLatents(*kept, contexts, captions, self.geometry[:, rows], features)

    def batch(self, rows: torch.Tensor, random: KeyedNoise) -> Batch:
        """A draw from the VAE's posteriors of some rows (B,), each from a view that is drawn as well."""
        noise, flip = random.normal(len(rows), *self.mean.shape[2:]), random.uniform(len(rows))
        views = (flip * len(self.mean)).long()
        return self._batch(views, rows, self.mean[views, rows] + self.std[views, rows] * noise)

    def mean_batch(self, rows: torch.Tensor) -> Batch:
        """The means of some rows (B,), not flipped."""
        views = torch.zeros_like(rows)
        return self._batch(views, rows, self.mean[views, rows])

    def _batch(self, views: torch.Tensor, rows: torch.Tensor, latents: torch.Tensor) -> Batch:
        features = None if self.features is None else self.features[views, rows]
        captions = [self.captions[row] for row in rows]
        return Batch(latents, features, self.masks[rows], self.geometry[views, rows], captions)


class LatentBatches:
    """The batches of one process, from latents in memory.

    Args:
        latents: the images.
        batch_size: images per process and batch.
        seed: the run's seed.
        process_index: this process.
        num_processes: number of processes.

    Raises:
        ValueError: if there are too few images for a batch.
    """

    def __init__(
        self, latents: ContextLatents, batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ):
        self.latents, self.batch_size, self.seed = latents, batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.sampler = ContextBalancedSampler(latents.contexts, seed)
        if not self._batches_per_epoch:
            raise ValueError(f"{len(latents)} images make no batch of {batch_size} for each process; lower it.")

    @property
    def _batches_per_epoch(self) -> int:
        return len(self.sampler) // (self.batch_size * self.num_processes)

    def batches(self, start: int) -> Iterator[tuple[Batch, KeyedNoise]]:
        """See [`Batches`]. An epoch leaves out the rows that do not fill a batch of all processes."""
        epoch, skipped = divmod(start, self._batches_per_epoch)
        number = start
        while True:
            self.sampler.set_epoch(epoch)
            parts = torch.tensor(list(self.sampler)).split(self.batch_size)
            for rows in parts[self.process_index :: self.num_processes][skipped : self._batches_per_epoch]:
                random = noise_of_batch(self.seed, number, self.process_index, self.num_processes)
                yield self.latents.batch(rows, random), random
                number += 1
            epoch, skipped = epoch + 1, 0


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
        image_features: what makes the features that the posterior reads, if it does not see latents.
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
        # with the names of what is kept, and how RGB is made: other versions of this function did other things
        settings = [_KEPT, "RGB over white", vars(transform), random_flip, vae.config.scaling_factor]
        if vae.config.get("shift_factor"):
            settings.append(vae.config.shift_factor)
        if image_features is not None:
            settings.append(image_features.digest())
        key = content_key(vae, dataset, *settings)
        rows = (2 if random_flip else 1, len(dataset))
        shapes = {name: (*rows, *shape) for name, shape in _shapes(vae, transform.resolution, image_features).items()}
        latents = cached(cache_dir, key, encode, wait_for_other_process, shapes)
    return ContextLatents(masks=masks, contexts=list(dataset["context"]), captions=list(dataset["text"]), **latents)


def _shapes(vae: AutoencoderKL, resolution: int, image_features: ImageFeatures | None) -> dict[str, tuple[int, ...]]:
    """The shapes of what is kept of a view of an image."""
    side = latent_size(vae, resolution)
    latent = (vae.config.latent_channels, side, side)
    shapes: dict[str, tuple[int, ...]] = {"mean": latent, "std": latent, "geometry": (6,)}
    if image_features is not None:
        size = image_features.size(side)
        shapes["features"] = (image_features.channels, size, size)
    return shapes


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
        mean, std = (part.float().cpu() for part in encode_pixels(vae, inputs))
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
