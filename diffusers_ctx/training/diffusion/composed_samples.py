"""Samples of combinations that the model draws itself, to learn the composition loss on.

At noisy images of one context, an intervention that its image lacks has little left to say: the image is decided. A
model that learned the sum there would learn to leave combinations out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object, send_to_device

from ..encoding.batch import Batch
from ..run.keyed_noise import KeyedNoise
from .composition import draw_combinations


COMPOSED_SHARE = 0.25  # of a batch's images
NUM_SAMPLES = 160  # at least, in the batches of all processes

Conditions = Callable[[list[str], torch.Tensor], dict[str, Any]]
"""Captions and geometry to keyword arguments of the backbone's call, but for the context tokens."""
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
"""Noise (B, C, h, w), exogenous noise (B, N, d_z), combinations (B, K) and conditions to latents (B, C, h, w)."""


class Composed(NamedTuple):
    """Samples that are learned beside some of a batch's images.

    Attributes:
        batch: the samples; masks are their combinations.
        z: (R, N, d_z), their exogenous noise.
        rows: (R,), places of those images, whose noise and timesteps the samples get.
    """

    batch: Batch
    z: torch.Tensor
    rows: torch.Tensor


class ComposedSamples:
    """The samples of a process, which belong to its places in the global batch.

    So a run is the same however many processes share the batch, and when it is resumed: checkpoints hold the samples.

    Args:
        seed: the run's seed.
        process_index: this process.
        num_processes: number of processes.
    """

    def __init__(self, seed: int, process_index: int = 0, num_processes: int = 1):
        self.seed, self.process_index, self.num_processes = seed, process_index, num_processes
        self._drawn: list[tuple[Batch, torch.Tensor]] = []

    def __bool__(self) -> bool:
        """Whether they have been drawn."""
        return bool(self._drawn)

    @torch.no_grad()
    def draw(
        self,
        batches: Iterator[tuple[Batch, KeyedNoise]],
        sample: Sampler,
        conditions: Conditions,
        noise_shape: Sequence[int],
        device: torch.device,
    ) -> None:
        """Draws a combination for each image of some batches, by its caption.

        Args:
            batches: the images.
            sample: the model.
            conditions: what it is told.
            noise_shape: (N, d_z), of the exogenous noise.
            device: the model's.
        """
        drawn: list[tuple[Batch, torch.Tensor]] = []
        for number, (batch, _) in enumerate(batches):
            size, num_concepts = batch.mask.shape
            share = {"process_index": self.process_index, "num_processes": self.num_processes}
            random = KeyedNoise(self.seed, "composed samples", number, **share)
            combinations = draw_combinations(batch.mask, random.uniform(size, num_concepts + 1))
            z, noise = random.normal(size, *noise_shape), random.normal(*batch.latents.shape)
            inputs = (noise, z, combinations, conditions(batch.captions, batch.geometry))
            latents = sample(*send_to_device(inputs, device)).float().cpu()
            drawn.append((batch._replace(latents=latents, features=None, mask=combinations), z))
            if len(drawn) * size * self.num_processes >= NUM_SAMPLES:
                break
        self._drawn = drawn

    def select(self, size: int, random: KeyedNoise) -> Composed | None:
        """Samples that are learned beside some of a batch's images, as many as it has."""
        chosen, number = random.uniform(size) < COMPOSED_SHARE, (random.uniform(size) * len(self._drawn)).long()
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            return None
        picked = [(*self._drawn[number[row]], row) for row in rows]
        captions = [sample.captions[row] for sample, _, row in picked]
        latents, mask, geometry, z = (
            torch.stack(parts)
            for parts in zip(*((s.latents[row], s.mask[row], s.geometry[row], z[row]) for s, z, row in picked))
        )
        return Composed(Batch(latents, None, mask, geometry, captions), z, rows)

    def state_dict(self) -> dict[str, Any]:
        """The samples of all processes, which must all ask for it."""
        return {"drawn": gather_object([[(tuple(batch), z) for batch, z in self._drawn]])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = [(Batch(*batch), z) for batch, z in state["drawn"][self.process_index]]
