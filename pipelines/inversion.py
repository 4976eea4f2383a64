"""Deterministic denoising (DDIM) and its inverse, as plain functions of a model of the velocity.

`model(x, t)` predicts the velocity `v = sqrt(alpha) noise - sqrt(1 - alpha) x_0` (B, C, h, w) of a noisy sample at
timestep `t`. `alphas` are the scheduler's cumulative products. With angles `phi_t = arccos(sqrt(alpha_t))`, a DDIM step
(Song et al. 2020, arXiv 2010.02502, equation 12 with sigma = 0) is a rotation, also where the terminal SNR is zero
(Salimans and Ho 2022, arXiv 2202.00512, appendix D):

    x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v(x_t, t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch


VelocityModel = Callable[[torch.Tensor, int], torch.Tensor]


def evenly_spaced_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps + 1` timesteps from the last one down to the first: a clean image counts as one at timestep 0."""
    steps = torch.linspace(num_train_timesteps - 1, 0, num_steps + 1)
    return [int(step) for step in steps.round()]


def velocity(prediction: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """The velocity, from what the UNet predicts of `x` at a cumulative product `alpha`.

    Raises:
        ValueError: for a prediction type other than `epsilon`, `v_prediction` and `sample`.
    """
    if prediction_type == "v_prediction":
        return prediction
    if prediction_type == "epsilon":
        return (prediction - (1 - alpha).sqrt() * x) / alpha.sqrt()
    if prediction_type == "sample":
        return (alpha.sqrt() * x - prediction) / (1 - alpha).sqrt()
    raise ValueError(f"Unknown prediction type '{prediction_type}'.")


def denoise(model: VelocityModel, x: torch.Tensor, alphas: torch.Tensor, timesteps: Sequence[int]) -> torch.Tensor:
    """Follows the ODE from `x` at `timesteps[0]` down to the clean end."""
    angles = alphas.sqrt().arccos()
    for t, s in pairwise(timesteps):
        turn = angles[t] - angles[s]
        x = turn.cos() * x - turn.sin() * model(x, t)
    return x


def invert(
    model: VelocityModel, x: torch.Tensor, alphas: torch.Tensor, timesteps: Sequence[int], num_iterations: int = 3
) -> torch.Tensor:
    """Follows the ODE back, from `x` at the clean end up to `timesteps[0]`, so that `denoise` returns to `x`.

    Each step solves the equation above for `x_t`, by `num_iterations` evaluations of the model at what `x_t` is so far
    (Pan et al. 2023, arXiv 2309.04907); the usual inversion makes do with one, taken at the wrong place.
    """
    angles = alphas.sqrt().arccos()
    for t, s in reversed(list(pairwise(timesteps))):
        turn = angles[t] - angles[s]
        guess = x
        for _ in range(num_iterations):
            guess = (x + turn.sin() * model(guess, t)) / turn.cos()
        x = guess
    return x
