"""Tests on held-out images whether the exogenous noise helps.

From few images, a posterior may learn little more than to identify its training images. A UNet that learns from such
values reproduces these images and ignores the prompt; it does better with the context alone. So where images are few,
some images learn without noise at first. Then images that neither stage has seen decide: noise inferred from them
should lower their loss about as much as noise from the prior raises it.
Were images `W z + e` with independent `z`, the two would be equal if noise is inferred exactly, and their ratio is
`2 rho - 1` if inferred noise correlates by `rho` with the true one. If it is low, the rest of the training goes
without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device

from ..config import TrainingConfig
from ..encoding.latents import ContextLatents
from ..run.keyed_noise import KeyedNoise
from .objective import DiffusionObjective, Draws


TRIAL_SHARE = 0.3  # of the training, before the decision
_WITHOUT = 0.2  # share of the images that learn without noise until then
_ENOUGH = 300  # images of each context: with as many, quad's concepts are found
_HELD_OUT_PART = 8  # an eighth of the images
_DRAWS = 16  # of noise and timesteps for every held-out image
_NOISIEST = 0.4  # share of the schedule that is tried: below it, the noisy image itself shows what the nodes say
_FEWEST = 8  # images that must be held out, all contexts together, to tell anything
CONFIRMED = 0.5  # share of the prior's effect that inferred noise must have: a correlation of 0.75


def can_try_noise(accelerator: Accelerator, config: TrainingConfig) -> bool:
    """Whether a run wants a trial, can hold images out, and can evaluate its objective outside of a step."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return config.context.try_noise and not config.data.streaming and accelerator.distributed_type not in sharded


def trial_images(contexts: Sequence[str]) -> int:
    """Images of each context to hold out for a trial; 0 where there are enough to do without, or too few."""
    sizes = Counter(contexts)
    held_out = min(sizes.values()) // _HELD_OUT_PART
    return held_out if min(sizes.values()) < _ENOUGH and held_out * len(sizes) >= _FEWEST else 0


class NoiseTrial:
    """A trial of the exogenous noise on held-out images.

    Args:
        held_out: the images.
        batch_size: images at once.
        seed: of noise and timesteps.

    Attributes:
        goes_without: whether the adapter does without noise; `None` before the decision.
    """

    def __init__(self, held_out: ContextLatents, batch_size: int, seed: int):
        self.held_out, self.batch_size, self.seed = held_out, batch_size, seed
        self.goes_without: bool | None = None

    def kept(self, batch_size: int, random: KeyedNoise) -> torch.Tensor | None:
        """Ones (B,) for images that learn with noise in a step, zeros for others; `None` after the trial."""
        if self.goes_without is not None:
            return None
        return (random.uniform(batch_size) >= _WITHOUT).float()

    @torch.no_grad()
    def effects(
        self,
        objective: DiffusionObjective,
        conditions: Callable[[list[str], torch.Tensor], dict[str, Any]],
        device: torch.device,
    ) -> tuple[float, float]:
        """By how much inferred noise lowers the mean loss on held-out images, and noise of the prior raises it.

        Args:
            objective: the loss.
            conditions: captions and geometry to keyword arguments of the backbone's call, but for the context tokens.
            device: the objective's.
        """
        count, module = len(self.held_out), objective.context_module
        losses = torch.zeros(3)
        for rows in torch.arange(count).split(self.batch_size):
            batch = self.held_out.mean_batch(rows)
            batch, inputs = send_to_device((batch, conditions(batch.captions, batch.geometry)), device)
            inferred = module.posterior(batch.posterior_input, batch.mask).mean
            for draw in range(_DRAWS):
                draws = send_to_device(self._draws(objective, draw, rows), device)
                noises = (torch.zeros_like(inferred), inferred, draws.eps)
                losses += torch.stack([objective.losses(batch, draws, inputs, z).float().sum().cpu() for z in noises])
        without, inferred, prior = (losses / (count * _DRAWS)).tolist()
        return without - inferred, prior - without

    def state_dict(self) -> dict[str, Any]:
        return {"goes_without": self.goes_without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.goes_without = state["goes_without"]

    def _draws(self, objective: DiffusionObjective, draw: int, rows: torch.Tensor) -> Draws:
        """Those of some images; an image's draws spread its timesteps over the noisiest part of the schedule."""
        random, count = KeyedNoise(self.seed, "noise trial", draw), len(self.held_out)
        shape_of_noise = objective.context_module.noise_shape
        place = 1 - _NOISIEST * (1 - (draw + random.uniform(count)) / _DRAWS)
        timesteps = (place * objective.noising.num_train_timesteps).long()
        noise, eps = (random.normal(*shape) for shape in (self.held_out.mean.shape[1:], (count, *shape_of_noise)))
        return Draws(noise[rows], timesteps[rows], eps[rows])
