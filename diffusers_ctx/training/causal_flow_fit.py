"""The law of the mechanisms' noise, learned from the noise of the training images once the concepts are known."""

from __future__ import annotations

from copy import deepcopy

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..context import CausalFlow, ContextModule
from .accelerator import take_main_weights
from .latents import ContextLatents
from .posterior_draws import draw_noise


_STEPS = 1500
_BATCH_SIZE = 1024
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 1e-3
_HELD_OUT_SHARE = 0.1
_LEAST_HELD_OUT = 20  # with fewer, chance would decide what is kept
_STEPS_OF_A_TRIAL = 150


def fit_causal_flow(
    accelerator: Accelerator, context_module: ContextModule, latents: ContextLatents, seed: int
) -> None:
    """Fits a module's `flow` by maximum likelihood to noise drawn from the posteriors of all images.

    Each node keeps what explains the noise of held-out images best, and stays the identity where nothing does that
    better, or there are fewer than 200 images.

    Every process does the same and takes the main process's result.

    Args:
        accelerator: has the device of the module.
        context_module: knows its concepts; its `flow` is changed.
        latents: the images.
        seed: of what is drawn.
    """
    flow, device = context_module.flow, accelerator.device
    held_out = int(_HELD_OUT_SHARE * len(latents))
    if flow is None or held_out < _LEAST_HELD_OUT:
        return
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    z = draw_noise(context_module, latents, order, seed, device).to(device)
    masks = latents.masks[order].to(z)
    flow.follow(context_module.causal.strengths())
    with torch.no_grad():
        values = context_module.concept_values(z, masks)[:, : flow.num_concepts]
        flow.value_scale.copy_(values.std(dim=0).clamp(min=1e-6))
        heard = flow.heard(z, masks, context_module.concept_values)
    _fit(flow, z, heard, held_out, seed, accelerator.is_main_process)
    take_main_weights(flow)


def _fit(
    flow: CausalFlow, z: torch.Tensor, heard: torch.Tensor, held_out: int, seed: int, show_progress: bool
) -> None:
    """Maximises the likelihood of all rows but the first; each node keeps the weights that are best on those."""

    def trial() -> torch.Tensor:
        with torch.no_grad():
            return _surprise(flow, z[:held_out], heard[:held_out])

    flow.requires_grad_(True)
    best, kept = trial(), deepcopy(flow.state_dict())
    optimizer = torch.optim.AdamW(flow.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(1, _STEPS + 1), desc="Fitting noise", disable=not show_progress):
        rows = torch.randint(held_out, len(z), (_BATCH_SIZE,), generator=generator).to(z.device)
        _surprise(flow, z[rows], heard[rows]).sum().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 20.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % _STEPS_OF_A_TRIAL == 0:
            now = trial()
            for name, weight in flow.named_parameters():  # whose first dimension is that of nodes
                kept[name][now < best] = weight.detach()[now < best]
            best = torch.minimum(best, now)
    flow.load_state_dict(kept)
    flow.requires_grad_(False)


def _surprise(flow: CausalFlow, z: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
    """Mean of `-log p(z_i | ...)` for each node (N,), but for a constant; nodes share no weights."""
    noise, log_derivatives = flow.explain(z, heard)
    return (0.5 * noise.square().sum(dim=-1) - log_derivatives).mean(dim=0)
