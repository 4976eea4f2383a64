"""Deterministic denoising (DDIM) and its inverse, as plain functions of a model.

`model(x, t)` predicts the noise, the clean image or the velocity `v = sqrt(alpha) noise - sqrt(1 - alpha) x_0` of a
noisy sample (B, C, h, w) at timestep `t`. `alphas` are the scheduler's cumulative products. With angles
`phi_t = arccos(sqrt(alpha_t))`, a DDIM step (Song et al. 2020, arXiv 2010.02502, equation 12 with sigma = 0) is a
rotation by `phi_t - phi_s`, also where the terminal SNR is zero (Salimans and Ho 2022, arXiv 2202.00512, appendix D):

    x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v(x_t, t)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler


Model = Callable[[torch.Tensor, int], torch.Tensor]
OnStep = Callable[[int, int, torch.Tensor], torch.Tensor]


def evenly_spaced_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps + 1` timesteps from the last one down to the first: a clean image counts as one at timestep 0."""
    steps = torch.linspace(num_train_timesteps - 1, 0, num_steps + 1)
    return [int(step) for step in steps.round()]


def noise_schedule(
    scheduler_config: Mapping[str, Any], num_steps: int, device: torch.device
) -> tuple[torch.Tensor, list[int], str]:
    """`alphas`, `timesteps` and `prediction_type` of `denoise` and `invert`, whichever scheduler samples.

    Not every scheduler's class computes all of them.
    """
    alphas = DDIMScheduler.from_config(scheduler_config).alphas_cumprod.to(device)
    timesteps = evenly_spaced_timesteps(scheduler_config["num_train_timesteps"], num_steps)
    return alphas, timesteps, scheduler_config["prediction_type"]


def ddim_coefficients(
    alpha_t: torch.Tensor, alpha_s: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `a` and `b` of a DDIM step `x_s = a x_t + b model(x_t, t)`.

    Raises:
        ValueError: for a prediction type other than `epsilon`, `v_prediction` and `sample`.
    """
    phi_t, phi_s = alpha_t.sqrt().arccos(), alpha_s.sqrt().arccos()
    turn = phi_t - phi_s
    if prediction_type == "v_prediction":
        return turn.cos(), -turn.sin()
    if prediction_type == "epsilon":
        return phi_s.cos() / phi_t.cos(), -turn.sin() / phi_t.cos()
    if prediction_type == "sample":
        return phi_s.sin() / phi_t.sin(), turn.sin() / phi_t.sin()
    raise ValueError(f"Unknown prediction type '{prediction_type}'.")


def denoise(
    model: Model,
    x: torch.Tensor,
    alphas: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    on_step: OnStep = lambda step, t, x: x,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Follows the ODE from `x` at `timesteps[0]` down to the clean end.

    After each step, `on_step` is given its number, the timestep it started from and its result, and returns what to
    go on with. Once `is_interrupted`, no further step is taken.

    `DDIMScheduler.step` computes the same; the rotation form is what `invert` solves for.
    """
    for step, (t, s) in enumerate(pairwise(timesteps)):
        a, b = ddim_coefficients(alphas[t], alphas[s], prediction_type)
        x = on_step(step, t, a * x + b * model(x, t))
        if is_interrupted():
            break
    return x


def invert(
    model: Model,
    x: torch.Tensor,
    alphas: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    num_iterations: int = 3,
) -> torch.Tensor:
    """Follows the ODE back, from `x` at the clean end up to `timesteps[0]`: `denoise` then returns to `x`."""
    return inverse_path(model, x, alphas, timesteps, prediction_type, num_iterations)[0]


def inverse_path(
    model: Model,
    x: torch.Tensor,
    alphas: torch.Tensor,
    timesteps: Sequence[int],
    prediction_type: str,
    num_iterations: int = 3,
) -> list[torch.Tensor]:
    """The samples at each of `timesteps` through which `denoise` would come to `x`; the last one is `x`.

    Each step solves the step of `denoise` for `x_t` by fixed-point iteration, evaluating the model `num_iterations`
    times at the current guess of `x_t` (Pan et al. 2023, arXiv 2309.04907); the usual inversion evaluates it once, at
    `x_s`. It iterates on what the model itself predicts: for a model of the noise, the velocity varies too fast with
    `x_t` near the noisy end to converge.
    """
    path = [x]
    for t, s in reversed(list(pairwise(timesteps))):
        a, b = ddim_coefficients(alphas[t], alphas[s], prediction_type)
        guess = x
        for _ in range(num_iterations):
            guess = (x - b * model(guess, t)) / a
        x = guess
        path.append(x)
    return path[::-1]
