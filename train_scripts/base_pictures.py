"""Where the pictures of a small base come from: captioned folders, or quad's simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from base_models import RESOLUTION
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffusers_ctx.data import quad
from diffusers_ctx.data.decoding import to_rgb


IMAGES_PER_DRAW = 2048  # of folders
QUAD_IMAGES_PER_DRAW = 512  # of each context
PASSES_PER_DRAW = 3  # of the UNet over the same images of quad, each time with other noise
_LARGEST_SHIFT = 0.06  # of half the picture
_LARGEST_ZOOM = 0.06


class Pictures(Protocol):
    """A source of pictures.

    Attributes:
        captions: some of them, with every word that occurs.
        passes: how often the UNet sees a draw, each time with other noise.
    """

    captions: list[str]
    passes: int

    def draws(self, seed: int, num_workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Endless draws of shuffled images (n, 64, 64, 3) uint8 and their captions."""


class Folders:
    """Captioned folders.

    A draw moves and zooms its pictures a little, since there are few of them.

    Args:
        folders: folders of images, each with a file `metadata.csv` of columns `file_name` and `text`.
        weights: how often each of them is drawn from, relative to the others.
        images_per_draw: how many.

    Raises:
        ValueError: if a folder has no captions, or there are not as many weights as folders.
    """

    passes = 1

    def __init__(self, folders: Sequence[Path], weights: Sequence[float], images_per_draw: int = IMAGES_PER_DRAW):
        if len(weights) != len(folders):
            raise ValueError(f"There are {len(folders)} folders and {len(weights)} weights.")
        self.shares = np.asarray(weights) / np.sum(weights)
        self.images_per_draw = images_per_draw
        self.parts = [_read_folder(folder) for folder in folders]
        self.captions = [caption for _, captions in self.parts for caption in dict.fromkeys(captions)]

    def draws(self, seed: int, num_workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """See [`Pictures.draws`]. Images are in memory, so that processes of a loader have nothing to do."""
        rng = np.random.default_rng(seed)
        while True:
            part = rng.choice(len(self.parts), self.images_per_draw, p=self.shares)
            row = rng.integers([len(self.parts[index][1]) for index in part])
            images = np.stack([self.parts[index][0][place] for index, place in zip(part, row)])
            yield distort(torch.from_numpy(images), rng), [self.parts[i][1][place] for i, place in zip(part, row)]


class QuadDraws(IterableDataset):
    """Endless draws of shuffled images of all contexts of quad's dependent variant, with their captions.

    No draw is repeated; seeds are below `quad.FIRST_HELD_OUT_SEED`.

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
                quad.generate(names, QUAD_IMAGES_PER_DRAW, seed=int(rng.integers(quad.FIRST_HELD_OUT_SEED)))
                for names in quad.contexts().values()
            ]
            images = np.concatenate([sample.images for sample in samples])
            captions = [caption for sample in samples for caption in sample.captions]
            order = rng.permutation(len(images))
            yield images[order], [captions[index] for index in order]


class Quad:
    """Quad's simulator; encoding its images costs time, so that each draw is used again."""

    passes = PASSES_PER_DRAW
    captions: ClassVar = [f"a picture of {name}" for name in ("a circle", "a square", "a triangle", "an ellipse")]

    def draws(self, seed: int, num_workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """See [`Pictures.draws`]."""
        yield from DataLoader(QuadDraws(seed), batch_size=None, num_workers=num_workers)


def distort(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Images (n, H, W, 3) uint8, each a little moved and zoomed; at an edge, the edge's color goes on."""
    n = len(images)
    zoom = 1 + rng.uniform(-_LARGEST_ZOOM, _LARGEST_ZOOM, n)
    shift = rng.uniform(-_LARGEST_SHIFT, _LARGEST_SHIFT, (n, 2))
    affine = np.zeros((n, 2, 3), np.float32)
    affine[:, 0, 0] = affine[:, 1, 1] = zoom
    affine[:, :, 2] = shift
    pixels = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(torch.from_numpy(affine), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


def _read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Images (n, 64, 64, 3) uint8 and captions."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    if "text" not in rows.column_names:
        raise ValueError(f"{folder} has no captions: give it a metadata.csv with columns file_name and text.")
    size = (RESOLUTION, RESOLUTION)
    return np.stack([np.asarray(to_rgb(image).resize(size)) for image in rows["image"]]), list(rows["text"])
