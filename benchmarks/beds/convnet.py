"""A small convolutional network that reads an attribute off images."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class ConvReader:
    """Reads a class or a real number off images, (n, R, R) or (n, R, R, 3) uint8.

    Args:
        classes: how many there are; `None` for a real number.
        augment: whether training images are moved, scaled, sheared, thickened and thinned at random, for attributes
            that this does not change.
        epochs: passes over the training images.
        seed: of weights and order.
    """

    def __init__(self, classes: int | None = None, augment: bool = False, epochs: int = 20, seed: int = 0) -> None:
        self.classes, self.augment, self.epochs, self.seed = classes, augment, epochs, seed

    def fit(self, images: np.ndarray, targets: np.ndarray) -> ConvReader:
        """Learns from images and their classes or values (n,); returns itself."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._fit(_pixels(images), torch.from_numpy(targets))
        return self

    @torch.no_grad()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes or values (n,) of images."""
        outputs = torch.cat([self._net(batch) for batch in _pixels(images).split(500)])
        if self.classes:
            return outputs.argmax(1).numpy()
        return (outputs[:, 0] * self._scale + self._mean).numpy()

    def _fit(self, pixels: torch.Tensor, targets: torch.Tensor, batch_size: int = 32) -> None:
        self._net = _network(pixels.shape[1], self.classes or 1)
        if not self.classes:
            self._mean, self._scale = targets.float().mean(), targets.float().std()
            targets = (targets.float() - self._mean) / self._scale
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=2e-3)
        steps = self.epochs * math.ceil(len(pixels) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(pixels)).split(batch_size):
                batch = _augmented(pixels[rows]) if self.augment else pixels[rows]
                outputs = self._net(batch)
                loss = (
                    F.cross_entropy(outputs, targets[rows])
                    if self.classes
                    else F.smooth_l1_loss(outputs[:, 0], targets[rows])
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        self._net.eval()


def _network(colors: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, channels in ((colors, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, outputs)
    )


def _pixels(images: np.ndarray) -> torch.Tensor:
    """Pixels (n, C, R, R) in [0, 1]; one channel of grey images, three of colored ones."""
    channels = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(channels).permute(0, 3, 1, 2).float() / 255


def _augmented(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (n, 1, R, R) under random affine maps, a third of them thicker and a third thinner."""
    n = len(pixels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n)

    scale = uniform(0.9, 2.0)  # of the window that is seen, so up to half the size
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, 0, 1] = scale * uniform(-0.3, 0.7)
    theta[:, :, 2] = torch.stack([uniform(-0.3, 0.3), uniform(-0.3, 0.3)], 1) * scale[:, None]
    moved = F.grid_sample(pixels, F.affine_grid(theta, list(pixels.shape), align_corners=False), align_corners=False)
    thicker, thinner = F.max_pool2d(moved, 3, 1, 1), -F.max_pool2d(-moved, 2, 1, 1)[:, :, :-1, :-1]
    choice = torch.randint(3, (n, 1, 1, 1))
    return torch.where(choice == 0, moved, torch.where(choice == 1, thicker, thinner))
