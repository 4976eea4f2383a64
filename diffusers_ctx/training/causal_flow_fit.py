"""The law of the mechanisms' noise, learned from the noise of the training images once the concepts are known."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..context import CausalFlow, ContextModule, Structural
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
_IMAGES_AT_ONCE = 512
_CAUSE_SHARE = 0.25  # of the strongest edge among concepts; weaker ones may be errors of what was learned


def fit_causal_flow(
    accelerator: Accelerator,
    context_module: ContextModule,
    latents: ContextLatents,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Fits a module's `flow` by maximum likelihood to noise drawn from the posteriors of all images.

    Contexts count equally. Each node keeps what explains the noise of held-out images best, and stays the identity
    where nothing does that better, or there are fewer than 200 images. Edges against the order of causes, and those of
    hidden factors that hardly cause a concept, are removed.

    Every process does the same and takes the main process's result.

    Args:
        accelerator: has the device of the module.
        context_module: knows its concepts; its `flow` is changed, and its causal layer as said.
        latents: the images.
        seed: of what is drawn.
        between: called now and then; may raise something to end it all.
    """
    flow, causal = context_module.flow, context_module.causal
    held_out = int(_HELD_OUT_SHARE * len(latents))
    if flow is None or not isinstance(causal, Structural) or held_out < _LEAST_HELD_OUT:
        return
    strengths = causal.strengths()
    given = context_module.config.graph is not None
    largest = float(strengths[: flow.num_concepts, : flow.num_concepts].max())
    causal.keep_edges(flow.follow(strengths, least=0.0 if given else _CAUSE_SHARE * largest))
    rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    noise = _explain_images(context_module, flow, latents, rows, seed, accelerator.device)
    _fit(flow, noise, held_out, seed, between, accelerator.is_main_process)
    take_main_weights(context_module)


@dataclass(frozen=True)
class DrawnNoise:
    """The mechanisms' noise of images.

    Attributes:
        z: (n, N, d).
        heard: (n, N, in_dim), see [`~context.causal_flow.CausalFlow.heard`].
        masks: (n, K).
        weights: (n,), such that contexts count equally; their mean is one.
    """

    z: torch.Tensor
    heard: torch.Tensor
    masks: torch.Tensor
    weights: torch.Tensor

    def surprise(self, flow: CausalFlow, rows: torch.Tensor | slice) -> torch.Tensor:
        """`-log p(z_i | ...)` (B, N), but for a constant."""
        noise, log_derivatives = flow.explain(self.z[rows], self.heard[rows], self.masks[rows])
        return 0.5 * noise.square().sum(dim=-1) - log_derivatives


@torch.no_grad()
def _explain_images(
    module: ContextModule,
    flow: CausalFlow,
    latents: ContextLatents,
    rows: torch.Tensor,
    seed: int,
    device: torch.device,
) -> DrawnNoise:
    drawn = draw_noise(module, latents, rows, seed, device).to(device)
    masks = latents.masks[rows].to(drawn)
    parts = list(zip(drawn.split(_IMAGES_AT_ONCE), masks.split(_IMAGES_AT_ONCE)))
    values = torch.cat([module.concept_values(*part)[:, : flow.num_concepts] for part in parts])
    flow.value_scale.copy_(values.std(dim=0).clamp(min=1e-6))
    heard = torch.cat([flow.heard(*part, module.concept_values) for part in parts])
    _, labels, counts = masks.unique(dim=0, return_inverse=True, return_counts=True)
    return DrawnNoise(drawn, heard, masks, len(masks) / (len(counts) * counts[labels]))


def _fit(
    flow: CausalFlow,
    noise: DrawnNoise,
    held_out: int,
    seed: int,
    between: Callable[[], None],
    show_progress: bool,
) -> None:
    """Maximises the likelihood of all rows but the first; each node keeps the weights that are best on those."""
    first, weights = slice(held_out), noise.weights.cpu()

    def trial() -> torch.Tensor:
        with torch.no_grad():
            return (noise.weights[first, None] * noise.surprise(flow, first)).mean(dim=0)

    flow.requires_grad_(True)
    best, kept = trial(), deepcopy(flow.state_dict())
    optimizer = torch.optim.AdamW(flow.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    generator = torch.Generator().manual_seed(seed)
    for step in tqdm(range(1, _STEPS + 1), desc="Fitting noise", disable=not show_progress):
        rows = held_out + torch.multinomial(weights[held_out:], _BATCH_SIZE, replacement=True, generator=generator)
        noise.surprise(flow, rows.to(noise.z.device)).mean(dim=0).sum().backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 20.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % _STEPS_OF_A_TRIAL == 0 or step == _STEPS:
            now = trial()
            for name, weight in flow.named_parameters():  # whose first dimension is that of nodes
                better = (now < best)[: len(weight)]
                kept[name][better] = weight.detach()[better]
            best = torch.minimum(best, now)
            between()
    flow.load_state_dict(kept)
    flow.requires_grad_(False)
