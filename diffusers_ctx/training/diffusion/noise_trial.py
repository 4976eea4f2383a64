"""Whether the exogenous noise earns its place, which held-out images tell.

From few images, the values that a posterior reads may be little more than the names of the images it has seen. A UNet
that learns from those values draws its training images again and forgets the prompt; it does better by the context
alone. So where images are few, training goes without noise for some images at first, and then asks whether noise
raises the loss on images that neither stage has seen. If it does, the rest of the training goes without.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device

from ..config import TrainingConfig
from ..encoding.batch import Batch
from ..encoding.latents import ContextLatents
from ..run.keyed_noise import KeyedNoise
from .objective import DiffusionObjective, Draws


TRIAL_SHARE = 0.5  # of the training, before the decision
_WITHOUT = 0.2  # share of the images that learn without noise until then
_ENOUGH = 300  # images of each context, with which noise has always earned its place
_HELD_OUT_PART = 8  # an eighth of the images
_DRAWS = 8  # of noise and timesteps for every held-out image
_NOISIEST = 0.2  # share of the schedule that is tried: below it, the noisy image itself shows what the nodes say
_STANDARD_ERRORS = 2.0  # by which noise must raise the loss


def can_try_noise(accelerator: Accelerator, config: TrainingConfig) -> bool:
    """Whether a run can hold images out, and evaluate its objective outside of a step."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return not config.data.streaming and accelerator.distributed_type not in sharded


def trial_images(contexts: Sequence[str]) -> int:
    """Images of each context to hold out for a trial; 0 where there are enough to do without, or too few."""
    smallest = min(Counter(contexts).values())
    return 0 if smallest >= _ENOUGH else smallest // _HELD_OUT_PART


class NoiseTrial:
    """A trial of the exogenous noise on held-out images.

    Args:
        held_out: the images.
        seed: of noise and timesteps.

    Attributes:
        goes_without: whether the adapter does without noise; `None` before the decision.
    """

    def __init__(self, held_out: ContextLatents, seed: int):
        self.held_out, self.seed = held_out, seed
        self.goes_without: bool | None = None

    def kept(self, batch_size: int, random: KeyedNoise) -> torch.Tensor | None:
        """Ones (B,) for images that learn with noise in a step, zeros for others; `None` after the trial."""
        if self.goes_without is not None:
            return None
        return (random.uniform(batch_size) >= _WITHOUT).float()

    @torch.no_grad()
    def decide(
        self, objective: DiffusionObjective, conditions: Callable[[Batch], dict[str, Any]], device: torch.device
    ) -> bool:
        """Whether the loss on held-out images is lower without noise, by more than it may be off.

        Args:
            objective: the loss.
            conditions: keyword arguments of the UNet's call for a batch, other than the context tokens.
            device: the objective's.
        """
        count = len(self.held_out)
        batch = self.held_out.mean_batch(torch.arange(count))
        inputs = send_to_device((batch, conditions(batch)), device)

        def losses(kept: float) -> torch.Tensor:
            """Those of the images (n,), with noise (1) or without (0); draws are the same."""
            total = torch.zeros(count)
            for draw in range(_DRAWS):
                draws = self._draws(batch, draw, objective)._replace(kept=torch.full((count,), kept))
                total += objective.losses(inputs[0], send_to_device(draws, device), inputs[1]).float().cpu()
            return total / _DRAWS

        harm = losses(1.0) - losses(0.0)
        return bool(harm.mean() > _STANDARD_ERRORS * harm.std() / count**0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"goes_without": self.goes_without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.goes_without = state["goes_without"]

    def _draws(self, batch: Batch, draw: int, objective: DiffusionObjective) -> Draws:
        """Of every image: the draws spread its timesteps evenly over the noisiest part of the schedule."""
        random, count = KeyedNoise(self.seed, "noise trial", draw), len(batch.mask)
        place = 1 - _NOISIEST * (1 - (draw + random.uniform(count)) / _DRAWS)
        timesteps = (place * objective.scheduler.config.num_train_timesteps).long()
        eps = torch.zeros(count, *objective.context_module.noise_shape)  # the posterior's mean
        return Draws(random.normal(*batch.latents.shape), timesteps, eps)
