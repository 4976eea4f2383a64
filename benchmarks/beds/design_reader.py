"""Reads attributes off small drawings: one convolutional network with a head for each, trained in a minute."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


STEPS = 700
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
UNKNOWN = -100  # what cross-entropy ignores


class Reader(nn.Module):
    """A classifier of several attributes.

    Args:
        classes: how many classes each attribute has.
    """

    def __init__(self, classes: Sequence[int]):
        super().__init__()
        widths = (3, 32, 64, 128, 256)
        blocks = [_block(*pair) for pair in itertools.pairwise(widths)]
        self.features = nn.Sequential(*blocks, nn.AdaptiveMaxPool2d(2))
        self.heads = nn.ModuleList(nn.Linear(4 * widths[-1], count) for count in classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits (n, classes) of each attribute for images (n, 3, R, R) in [0, 1]."""
        features = self.features(images).flatten(1)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images: np.ndarray) -> np.ndarray:
        """The likeliest class (n, attributes) of each attribute, for images (n, R, R, 3) uint8."""
        batches = _to_tensor(images).split(256)
        return torch.cat([torch.stack([logits.argmax(1) for logits in self(batch)], 1) for batch in batches]).numpy()


def train_reader(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[int], tone: int, steps: int = STEPS, seed: int = 0
) -> Reader:
    """A reader that learned from labelled images, each in ever new versions.

    Args:
        images: (n, R, R, 3) uint8.
        labels: (n, attributes), classes as numbers; NaN where one is not known.
        classes: how many classes each attribute has.
        tone: the attribute that versions in other colours no longer show.
        steps: of training.
        seed: of weights, batches and versions.
    """
    pixels = _to_tensor(images)
    targets = torch.from_numpy(np.nan_to_num(labels, nan=UNKNOWN)).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(classes)
        optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
        for _ in range(steps):
            rows = torch.randint(len(pixels), (BATCH_SIZE,))
            batch, known = pixels[rows], targets[rows]
            recoloured = torch.rand(BATCH_SIZE) < 0.5
            batch[recoloured] = _recolour(batch[recoloured])
            known[recoloured, tone] = UNKNOWN
            losses = [
                F.cross_entropy(logits, known[:, column], ignore_index=UNKNOWN, reduction="sum") / BATCH_SIZE
                for column, logits in enumerate(reader(_distort(batch)))
            ]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            schedule.step()
    return reader.eval()


def cached_reader(
    cache_dir: Path, images: np.ndarray, labels: np.ndarray, classes: Sequence[int], tone: int
) -> Reader:
    """`train_reader`'s reader, from a file if this code has learned from these images before."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + images.tobytes() + labels.tobytes()).hexdigest()
    file = cache_dir / f"reader-{digest[:16]}.safetensors"
    if not file.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        save_file(train_reader(images, labels, classes, tone).state_dict(), file)
    reader = Reader(classes)
    reader.load_state_dict(load_file(file))
    return reader.eval()


def _block(inputs: int, outputs: int) -> nn.Module:
    """Half the resolution."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _to_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def _recolour(images: Tensor) -> Tensor:
    """Channels mixed anew for each image; white and greys stay."""
    mixtures = torch.softmax(2 * torch.randn(len(images), 3, 3), dim=2)
    return torch.einsum("ncd,ndhw->nchw", mixtures, images)


def _distort(images: Tensor) -> Tensor:
    """Mirrored, moved, turned and scaled a little, some of them blurred, some with noise; on white."""
    n, size = len(images), images.shape[-1]
    angle, scale = 0.15 * torch.randn(n), 1 + 0.1 * torch.randn(n)
    mirror = torch.randint(2, (n,)) * 2 - 1
    matrices = torch.zeros(n, 2, 3)
    matrices[:, 0, 0], matrices[:, 0, 1] = mirror * scale * angle.cos(), -scale * angle.sin()
    matrices[:, 1, 0], matrices[:, 1, 1] = mirror * scale * angle.sin(), scale * angle.cos()
    matrices[:, :, 2] = 0.08 * torch.randn(n, 2)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)
    blurred = F.interpolate(F.avg_pool2d(images, 2), size=(size, size), mode="bilinear")
    images = torch.where(torch.rand(n, 1, 1, 1) < 0.3, blurred, images)
    return images + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)
