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
from ..encoding.latents import ContextLatents
from ..run.keyed_noise import KeyedNoise
from .objective import DiffusionObjective, Draws


TRIAL_SHARE = 0.5  # of the training, before the decision
_WITHOUT = 0.2  # share of the images that learn without noise until then
_ENOUGH = 300  # images of each context: with as many, quad's concepts are found
_HELD_OUT_PART = 8  # an eighth of the images
_DRAWS = 8  # of noise and timesteps for every held-out image
_NOISIEST = 0.2  # share of the schedule that is tried: below it, the noisy image itself shows what the nodes say
_FEWEST = 8  # images that must be held out, all contexts together, to tell anything
STANDARD_ERRORS = 3.0  # by which noise must raise the loss; it is lost for good


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
    def harm(
        self,
        objective: DiffusionObjective,
        conditions: Callable[[list[str], torch.Tensor], dict[str, Any]],
        device: torch.device,
    ) -> tuple[float, float]:
        """By how much noise raises the loss on held-out images, and the standard error of that.

        Args:
            objective: the loss.
            conditions: captions and geometry to keyword arguments of the UNet's call, but for the context tokens.
            device: the objective's.
        """
        count = len(self.held_out)
        harm = torch.zeros(count)
        for rows in torch.arange(count).split(self.batch_size):
            batch = self.held_out.mean_batch(rows)
            inputs = send_to_device((batch, conditions(batch.captions, batch.geometry)), device)
            for draw in range(_DRAWS):
                draws = self._draws(objective, draw, rows)
                for kept, sign in ((1.0, 1), (0.0, -1)):
                    drawn = send_to_device(draws._replace(kept=torch.full((len(rows),), kept)), device)
                    harm[rows] += sign * objective.losses(inputs[0], drawn, inputs[1]).float().cpu() / _DRAWS
        return harm.mean().item(), (harm.std() / count**0.5).item()

    def state_dict(self) -> dict[str, Any]:
        return {"goes_without": self.goes_without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.goes_without = state["goes_without"]

    def _draws(self, objective: DiffusionObjective, draw: int, rows: torch.Tensor) -> Draws:
        """Those of some images; an image's draws spread its timesteps over the noisiest part of the schedule."""
        random, count = KeyedNoise(self.seed, "noise trial", draw), len(self.held_out)
        place = 1 - _NOISIEST * (1 - (draw + random.uniform(count)) / _DRAWS)
        timesteps = (place * objective.scheduler.config.num_train_timesteps).long()
        eps = torch.zeros(len(rows), *objective.context_module.noise_shape)  # the posterior's mean
        return Draws(random.normal(*self.held_out.mean.shape[1:])[rows], timesteps[rows], eps)
