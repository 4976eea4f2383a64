"""What captions say, learned from the images' node values: the last that is learned of the concepts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy

import torch
from accelerate import Accelerator

from ...context import CaptionLikelihood, ContextModule, embed_captions
from ...keyed_random import keyed_generator
from ..encoding.latents import ContextLatents
from ..run.accelerator import broadcast_weights
from ..run.keyed_noise import KeyedNoise


logger = logging.getLogger(__name__)

_STEPS = 1000
_BATCH_SIZE = 256
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.1
_HELD_OUT_SHARE = 0.1
_LEAST_HELD_OUT = 20  # with fewer, chance would decide what is kept
LEAST_CAPTIONED = round(_LEAST_HELD_OUT / _HELD_OUT_SHARE)
_STEPS_OF_A_TRIAL = 50
_IMAGES_AT_ONCE = 512
_CAPTIONS_AT_ONCE = 16


def fit_captions(
    accelerator: Accelerator,
    context_module: ContextModule,
    latents: ContextLatents,
    encode: Callable[[list[str]], dict[str, torch.Tensor]],
    seed: int,
) -> None:
    """Teaches a module's `captions` which node values go with which captions.

    It keeps the weights that tell captions of held-out images apart best. It stays as it is where captions do not
    differ or nothing helps, and, with a warning, where fewer than 200 images have one.

    Every process does the same and takes the main process's result.

    Args:
        accelerator: has the device of the module.
        context_module: knows its concepts; its `captions` are changed.
        latents: the images.
        encode: the text encoders' output for captions, see [`~pipelines.Conditioner.encode_captions`].
        seed: of what is drawn.
    """
    known = context_module.require_captions()
    rows = [row for row, caption in enumerate(latents.captions) if caption]  # where there is none, nothing is said
    names = sorted({latents.captions[row] for row in rows})
    held_out = int(_HELD_OUT_SHARE * len(rows))
    if len(names) < 2:
        return
    if held_out < _LEAST_HELD_OUT:
        if accelerator.is_main_process:
            logger.warning(
                f"{len(rows)} of the images that are not held out have a caption, and {LEAST_CAPTIONED} are needed to"
                " learn what captions say: samples will be drawn without `match_prompt`. Caption more images."
            )
        return
    with torch.no_grad():
        parts = (names[start : start + _CAPTIONS_AT_ONCE] for start in range(0, len(names), _CAPTIONS_AT_ONCE))
        embedded = torch.cat([embed_captions(encode(part)["text"]).cpu() for part in parts])
    place = {name: row for row, name in enumerate(names)}
    captions = embedded[[place[latents.captions[row]] for row in rows]]
    values = _draw_values(context_module, latents, torch.tensor(rows), seed, accelerator.device)
    likelihood = CaptionLikelihood(values[0].numel(), captions.shape[1])  # on the CPU, which it is too small for
    likelihood.load_state_dict(known.state_dict())
    likelihood.standardize(captions)
    generator = keyed_generator(seed, "captions")
    order = torch.randperm(len(rows), generator=generator)
    _fit(likelihood, values[order], captions[order], held_out, generator)
    known.load_state_dict(likelihood.state_dict())
    broadcast_weights(known)


def _fit(
    likelihood: CaptionLikelihood,
    values: torch.Tensor,
    captions: torch.Tensor,
    held_out: int,
    generator: torch.Generator,
) -> None:
    """Minimizes the contrast on all rows but the first, and keeps the weights that are best on those."""

    def trial() -> float:
        with torch.no_grad():
            batches = zip(values[:held_out].split(_BATCH_SIZE), captions[:held_out].split(_BATCH_SIZE))
            return sum(float(likelihood.contrast(*batch)) * len(batch[0]) for batch in batches)

    best, kept = trial(), deepcopy(likelihood.state_dict())
    optimizer = torch.optim.AdamW(likelihood.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for step in range(_STEPS):
        rows = torch.randint(held_out, len(values), (_BATCH_SIZE,), generator=generator)
        likelihood.contrast(values[rows], captions[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % _STEPS_OF_A_TRIAL == 0 and (error := trial()) < best:
            best, kept = error, deepcopy(likelihood.state_dict())
    likelihood.load_state_dict(kept)


@torch.no_grad()
def _draw_values(
    context_module: ContextModule, latents: ContextLatents, rows: torch.Tensor, seed: int, device: torch.device
) -> torch.Tensor:
    """Node values (B, N, d) of some images, drawn from their posteriors as noise is drawn from the prior."""
    exogenous = KeyedNoise(seed, "captions noise").normal(len(latents), *context_module.noise_shape)
    values = []
    for part in rows.split(_IMAGES_AT_ONCE):
        mask = latents.masks[part].to(device)
        posterior = context_module.posterior(latents.posterior_input[0, part].to(device), mask)
        noise = posterior.at(exogenous[part].to(device))
        values.append(context_module.concept_values(noise, mask.to(noise)).cpu())
    return torch.cat(values)
