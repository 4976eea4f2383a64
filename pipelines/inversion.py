"""Deterministic denoising and its inverse, as plain functions of a model.

`model(x, t)` predicts what it was trained to predict of a noisy sample (B, C, h, w) at timestep `t`. The steps come
from [`~adapter.backbones.Noising`]: those of DDIM (Song et al. 2020, arXiv 2010.02502) for diffusion, and Euler's for
rectified flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from diffusers_ctx.adapter.backbones import Step


Model = Callable[[torch.Tensor, float], torch.Tensor]
OnStep = Callable[[int, float, torch.Tensor], torch.Tensor]


def denoise(
    model: Model,
    x: torch.Tensor,
    steps: Sequence[Step],
    on_step: OnStep = lambda step, t, x: x,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Follows the ODE from `x` at the noisy end down to the clean one.

    After each step, `on_step` is given its number, the timestep it started from and its result, and returns what to
    go on with. Once `is_interrupted`, no further step is taken.

    The schedulers' own `step` computes the same; this form is what `invert` solves for.
    """
    for number, (t, a, b) in enumerate(steps):
        x = on_step(number, t, a * x + b * model(x, t))
        if is_interrupted():
            break
    return x


def invert(model: Model, x: torch.Tensor, steps: Sequence[Step], num_iterations: int = 3) -> torch.Tensor:
    """Follows the ODE back, from `x` at the clean end up to the noisy one: `denoise` then returns to `x`."""
    return inverse_path(model, x, steps, num_iterations)[0]


def inverse_path(model: Model, x: torch.Tensor, steps: Sequence[Step], num_iterations: int = 3) -> list[torch.Tensor]:
    """The samples before each of `steps` through which `denoise` would come to `x`, and `x`.

    Each step solves the step of `denoise` for `x_t` by fixed-point iteration, evaluating the model `num_iterations`
    times at the current guess of `x_t` (Pan et al. 2023, arXiv 2309.04907); the usual inversion evaluates it once, at
    `x_s`. It iterates on what the model itself predicts: for a model of the noise, the velocity varies too fast with
    `x_t` near the noisy end to converge.
    """
    path = [x]
    for t, a, b in reversed(steps):
        guess = x
        for _ in range(num_iterations):
            guess = (x - b * model(guess, t)) / a
        x = guess
        path.append(x)
    return path[::-1]
