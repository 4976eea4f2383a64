"""The first part of training: what the concepts are, learned with a light decoder in the place of the UNet."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ..context import ContextModule
from ..data import ContextBalancedSampler
from .config import TrainingConfig
from .latents import ContextLatents
from .noise import KeyedNoise
from .objective import AbductionObjective


def learn_abduction(
    accelerator: Accelerator, context_module: ContextModule, latents: ContextLatents, config: TrainingConfig
) -> dict[str, float]:
    """Trains mechanisms, causal layer and posterior; the read-out learns later, with the UNet.

    Returns:
        The last step's figures: `abduction_mse` and, for each node, `kl/<name>` in nats.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    options = config.context
    channels, size = latents.mean.shape[2], latents.mean.shape[-1]
    context_module.requires_grad_(True).read_out.requires_grad_(False)
    objective = AbductionObjective(
        context_module, channels, size, options.acyclicity_weight, options.sparsity_weight
    ).to(accelerator.device)
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.abduction_learning_rate, weight_decay=1e-4)
    steps = options.abduction_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)

    batch_size = -(-options.abduction_batch_size // accelerator.num_processes)
    batches = _batches(latents, config.optimization.seed, accelerator.num_processes * batch_size)
    figures: dict[str, torch.Tensor] = {}
    for step in tqdm(range(steps), desc="Learning concepts", disable=not accelerator.is_main_process):
        rows = next(batches).chunk(accelerator.num_processes)[accelerator.process_index]
        # negative steps: the numbers of this part of training are not those of the next
        noise = KeyedNoise(config.optimization.seed, -1 - step, accelerator.process_index, accelerator.num_processes)
        drawn = latents.draw(rows, noise.normal(len(rows), *latents.mean.shape[2:]), noise.uniform(len(rows)))
        exogenous = noise.normal(len(rows), *context_module.noise_shape)
        kl_weight = options.kl_weight * min(1.0, (step + 1) / max(1, options.kl_warmup_steps))
        loss, figures = wrapped(
            drawn.to(accelerator.device),
            latents.masks[rows].to(accelerator.device),
            exogenous.to(accelerator.device),
            kl_weight,
        )
        if not accelerator.reduce(loss.detach(), "mean").isfinite():
            raise FloatingPointError(
                f"The loss is not finite at step {step} of learning the concepts; lower `abduction_learning_rate`."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 50.0)  # the bound is a sum over dimensions, and so are its gradients
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    accelerator.free_memory(wrapped, optimizer)
    divergences = dict(zip(context_module.node_names, figures["kl"].tolist()))
    return {"abduction_mse": figures["abduction_mse"].item()} | {f"kl/{name}": kl for name, kl in divergences.items()}


def _batches(latents: ContextLatents, seed: int, batch_size: int):
    """Endless batches of rows (batch_size,), with every context as often as the others."""
    sampler = ContextBalancedSampler(latents.contexts, seed)
    rows: list[int] = []
    epoch = 0
    while True:
        while len(rows) < batch_size:
            sampler.set_epoch(epoch)
            rows += list(sampler)
            epoch += 1
        yield torch.tensor(rows[:batch_size])
        rows = rows[batch_size:]
