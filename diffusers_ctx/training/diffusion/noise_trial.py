"""Whether a node's exogenous noise earns its place, which held-out images tell.

From few images, the values that a posterior reads may be little more than the names of the images it has seen. A UNet
that learns from those values draws its training images again and forgets the prompt; it does better by the context
alone. So where images are few, training goes without the noise of random nodes at first, and then asks of each node
whether its noise lowers the loss on images that neither stage has seen. Nodes of which it does not lose theirs.
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
_ENOUGH = 300  # images of each context, with which noise has always earned its place
_HELD_OUT_PART = 8  # an eighth of the images
_DRAWS = 8  # of noise and timesteps for every held-out image
_NOISIEST = 0.2  # share of the schedule that is tried: below it, the noisy image itself shows what the nodes say
_STANDARD_ERRORS = 2.0  # by which noise must lower the loss


def can_try_noise(accelerator: Accelerator, config: TrainingConfig) -> bool:
    """Whether a run can hold images out, and evaluate its objective outside of a step."""
    sharded = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return not config.data.streaming and accelerator.distributed_type not in sharded


def trial_images(contexts: Sequence[str]) -> int:
    """Images of each context to hold out for a trial; 0 where there are enough to do without, or too few."""
    smallest = min(Counter(contexts).values())
    return 0 if smallest >= _ENOUGH else smallest // _HELD_OUT_PART


class NoiseTrial:
    """A trial of the nodes' noise on held-out images.

    Args:
        held_out: the images.
        seed: of noise and timesteps.

    Attributes:
        without: names of the nodes that do without their noise; `None` before the decision.
    """

    def __init__(self, held_out: ContextLatents, seed: int):
        self.held_out, self.seed = held_out, seed
        self.without: list[str] | None = None

    def kept(self, batch_size: int, num_nodes: int, random: KeyedNoise) -> torch.Tensor | None:
        """Ones (B, N) where a node of an image keeps its noise for a step, zeros elsewhere; `None` after the trial.

        The share that is kept is drawn for each image, so that with all noise, with none and with some of it the UNet
        has learned.
        """
        if self.without is not None:
            return None
        share = random.uniform(batch_size, 1)
        return (random.uniform(batch_size, num_nodes) < share).float()

    @torch.no_grad()
    def decide(
        self, objective: DiffusionObjective, conditions: Callable[[Batch], dict[str, Any]], device: torch.device
    ) -> list[str]:
        """Decides which nodes do without their noise.

        Args:
            objective: the loss.
            conditions: keyword arguments of the UNet's call for a batch, other than the context tokens.
            device: the objective's.

        Returns:
            Their names.
        """
        module = objective.context_module
        num_nodes = len(module.node_names)
        count = len(self.held_out)
        batch = self.held_out.mean_batch(torch.arange(count))
        inputs = send_to_device((batch, conditions(batch)), device)

        def losses(kept: torch.Tensor) -> torch.Tensor:
            """Those of the images (n,) with the noise of some nodes (N,); draws are always the same."""
            total = torch.zeros(count)
            for draw in range(_DRAWS):
                draws = self._draws(batch, draw, module.noise_shape, objective.scheduler.config.num_train_timesteps)
                draws = draws._replace(kept=kept.expand(count, -1))
                total += objective.losses(inputs[0], send_to_device(draws, device), inputs[1]).float().cpu()
            return total / _DRAWS

        none = losses(torch.zeros(num_nodes))
        earned = torch.tensor([float(_lower(losses(alone), none)) for alone in torch.eye(num_nodes)])
        if earned.any() and not _lower(losses(earned), none):
            earned.zero_()
        return [name for name, keeps in zip(module.node_names, earned.tolist()) if not keeps]

    def state_dict(self) -> dict[str, Any]:
        return {"without": self.without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.without = state["without"]

    def _draws(self, batch: Batch, draw: int, noise_shape: tuple[int, int], num_timesteps: int) -> Draws:
        """Of every image: the draws spread its timesteps evenly over the noisiest part of the schedule."""
        random, count = KeyedNoise(self.seed, "noise trial", draw), len(batch.mask)
        place = 1 - _NOISIEST * (1 - (draw + random.uniform(count)) / _DRAWS)
        timesteps = (place * num_timesteps).long()
        eps = torch.zeros(count, *noise_shape)  # the posterior's mean
        return Draws(random.normal(*batch.latents.shape), timesteps, eps)


def _lower(losses: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether losses (n,) are lower than others of the same images, by more than their difference may be off."""
    gain = others - losses
    return bool(gain.mean() > _STANDARD_ERRORS * gain.std() / len(gain) ** 0.5)
