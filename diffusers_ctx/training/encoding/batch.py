"""What both stages of training learn from: a batch of encoded images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from ..run.keyed_noise import KeyedNoise


class Batch(NamedTuple):
    """Encoded images in contexts.

    A tuple, which Accelerate, DDP and FSDP move between devices and torch.compile traces.

    Attributes:
        latents: (B, C, h, w), drawn from the VAE's posterior and scaled.
        features: (B, F, h', w'), what the posterior reads instead of latents, if anything.
        mask: (B, K), intervention masks.
        geometry: (B, 6), each image's original height and width, top and left of its crop in the resized image, and
            height and width of the crop, in pixels.
        captions: B captions.
    """

    latents: torch.Tensor
    features: torch.Tensor | None
    mask: torch.Tensor
    geometry: torch.Tensor
    captions: list[str]

    @property
    def posterior_input(self) -> torch.Tensor:
        """What the posterior reads."""
        return self.latents if self.features is None else self.features


def noise_of_batch(seed: int, number: int, process_index: int, num_processes: int) -> KeyedNoise:
    """The random numbers of a process's batch in the diffusion stage, wherever its images come from."""
    return KeyedNoise(seed, "diffusion", number, process_index=process_index, num_processes=num_processes)


class Batches(Protocol):
    """The batches of one process, from memory or from a stream."""

    def batches(self, start: int) -> Iterator[tuple[Batch, KeyedNoise]]:
        """Batches without end, each with the random numbers of its step, from number `start` of the whole run."""
