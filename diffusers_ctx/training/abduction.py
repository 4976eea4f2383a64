"""The first part of training: what the concepts are, learned with a light decoder in the place of the UNet.

In a diffusion loss, most of which does not depend on the context, that signal drowns. A light decoder sees little
else, and its steps are cheap.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ..context import ContextModule
from ..data import ContextBalancedSampler
from .abduction_objective import AbductionObjective
from .config import TrainingConfig
from .latents import ContextLatents
from .noise import KeyedNoise


logger = logging.getLogger(__name__)

_COLLAPSED = 0.1  # nats; a concept that was found has some three
_DIRECTIONS = 64  # in the space of the noise
_LATENT_DIRECTIONS = 128
_MECHANISMS_RATE = 10  # mechanisms must keep pace with values whose scale the encoder sets


def learn_abduction(
    accelerator: Accelerator, context_module: ContextModule, latents: ContextLatents, config: TrainingConfig
) -> dict[str, float]:
    """Trains mechanisms, causal layer and posterior; the read-out learns later, with the UNet.

    Every process does the same steps and takes the main process's result: the steps are cheap, and their terms
    compare images within the batch, which must not be torn apart.

    Returns:
        The last step's figures, among them `kl/<name>` for each node, in nats.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    options, seed = config.context, config.optimization.seed
    contexts, labels = latents.masks.unique(dim=0, return_inverse=True)
    context_module.requires_grad_(True).read_out.requires_grad_(False)
    channels, size = latents.mean.shape[2], latents.mean.shape[-1]
    objective = AbductionObjective(context_module, contexts, channels, size, options).to(accelerator.device)
    optimizer, parameters = _create_optimizer(objective, options.abduction_learning_rate)
    steps = options.abduction_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)

    figures: dict[str, torch.Tensor] = {}
    batches = _batches(latents.contexts, labels, seed, options.abduction_batch_size)
    progress = tqdm(range(steps), desc="Learning concepts", disable=not accelerator.is_main_process)
    for step in progress:
        rows = next(batches)
        # negative numbers: those of the second part of training start at zero
        inputs = _step_inputs(latents, labels, rows, KeyedNoise(seed, -1 - step), objective)
        loss, figures = objective(*(tensor.to(accelerator.device) for tensor in inputs), step)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is not finite at step {step} of learning the concepts; lower `abduction_learning_rate`."
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 50.0)  # the bound is a sum over dimensions; so are its gradients
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(
            {name: f"{value:.3f}" for name, value in figures.items() if value.ndim == 0}, refresh=False
        )
    for parameter in context_module.parameters():
        parameter.data = broadcast(parameter.data)
    divergences = dict(zip(context_module.node_names, figures.pop("kl").tolist()))
    if accelerator.is_main_process:
        _warn_of_collapse({name: divergences[name] for name in context_module.config.concepts})
    return {name: value.item() for name, value in figures.items()} | {
        f"kl/{name}": divergence for name, divergence in divergences.items()
    }


def _warn_of_collapse(divergences: dict[str, float]) -> None:
    collapsed = [name for name, nats in divergences.items() if nats < _COLLAPSED]
    if collapsed:
        logger.warning(
            f"The noise of {collapsed} says next to nothing about the images (less than {_COLLAPSED} nats):"
            " composition and counterfactuals will not keep what it stands for. Lower `kl_weight`, raise"
            " `abduction_steps`, or give more images of these contexts."
        )


def _create_optimizer(
    objective: AbductionObjective, learning_rate: float
) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    module = objective.context_module
    mechanisms = [*module.mechanism.parameters(), *module.causal.parameters()]
    known = {id(parameter) for parameter in mechanisms}
    others = [p for p in objective.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": others, "weight_decay": 1e-4},
        {"params": mechanisms, "weight_decay": 0.0, "lr": _MECHANISMS_RATE * learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate), mechanisms + others


def _batches(contexts: list[str], labels: torch.Tensor, seed: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless batches of rows, equally many of every context and sorted by it; at least `batch_size` of them."""
    sampler = ContextBalancedSampler(contexts, seed)
    batch_size = -(-batch_size // sampler.num_contexts) * sampler.num_contexts
    rows: list[int] = []
    epoch = 0
    while True:
        while len(rows) < batch_size:
            sampler.set_epoch(epoch)
            rows += list(sampler)
            epoch += 1
        batch = torch.tensor(rows[:batch_size])
        yield batch[labels[batch].argsort(stable=True)]
        rows = rows[batch_size:]


def _step_inputs(
    latents: ContextLatents, labels: torch.Tensor, rows: torch.Tensor, noise: KeyedNoise, objective: AbductionObjective
) -> tuple[torch.Tensor, ...]:
    size, (nodes, dim) = len(rows), objective.context_module.noise_shape
    drawn = latents.draw(rows, noise.normal(size, *latents.mean.shape[2:]), noise.uniform(size))
    exogenous, reference = noise.normal(size, nodes, dim), noise.normal(size, nodes, dim)
    directions = F.normalize(noise.normal(nodes * dim, _DIRECTIONS), dim=0)
    latent_directions = F.normalize(noise.normal(objective.dimensions, _LATENT_DIRECTIONS), dim=0)
    return drawn, labels[rows], exogenous, reference, directions, latent_directions
