"""The distribution of training timesteps."""

from __future__ import annotations

import torch

from ..config import TimestepSampling


def sample_timesteps(uniform: torch.Tensor, sampling: TimestepSampling, num_train_timesteps: int) -> torch.Tensor:
    """Timesteps (B,) from uniform numbers, by the inverse of the distribution function.

    Args:
        uniform: (B,), in [0, 1).
        sampling: `uniform`; `logit_normal`, most often in the middle (Esser et al. 2024, arXiv 2403.03206, equation
            19, with location 0 and scale 1); `high_noise`, in proportion to the timestep, for concepts that move large
            areas, which sampling decides first.
        num_train_timesteps: the number of timesteps of the noise schedule.
    """
    if sampling == "logit_normal":
        uniform = torch.special.ndtri(uniform.double()).sigmoid()
    elif sampling == "high_noise":
        uniform = uniform.sqrt()
    return (uniform * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
