"""How images are noised, what a model of the noisy ones predicts, and the steps of the ODE that leads back.

Timesteps are places in the schedule of training, integers from 0, next to a clean image, to the noisiest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_snr


class Step(NamedTuple):
    """A deterministic step from a noisy sample to a less noisy one: `x_s = a x_t + b model(x_t, t)`.

    Attributes:
        timestep: `t`, as the model is told it.
        a: the sample's coefficient.
        b: the prediction's coefficient.
    """

    timestep: int | float
    a: torch.Tensor | float
    b: torch.Tensor | float


class Noising(ABC):
    """How a base model's images are noised, and what it predicts.

    Args:
        scheduler_config: the configuration of a pipeline's scheduler, of whatever class.

    Attributes:
        is_diffusion: whether there are several prediction types, and signal-to-noise ratios to weigh losses by.
        num_train_timesteps: number of timesteps.
    """

    is_diffusion: ClassVar[bool]
    num_train_timesteps: int

    @abstractmethod
    def __init__(self, scheduler_config: Mapping[str, Any]): ...

    @abstractmethod
    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) with noise, at timesteps (B,)."""

    @abstractmethod
    def told(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What a model is told of timesteps (B,)."""

    @abstractmethod
    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model is to predict (B, C, h, w)."""

    @abstractmethod
    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Loss weights (B,) of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556).

        Raises:
            ValueError: if it is not defined for these models.
        """

    @abstractmethod
    def steps(self, num_steps: int, latents: torch.Tensor) -> list[Step]:
        """The steps from the noisy end to the clean one, of latents (B, C, h, w)."""


class Diffusion(Noising):
    """Variance-preserving diffusion: models predict the noise, the velocity or the image."""

    is_diffusion = True

    def __init__(self, scheduler_config: Mapping[str, Any]):
        self.config = scheduler_config
        self.scheduler = DDPMScheduler.from_config(scheduler_config)
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def told(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        assert prediction_type == "sample"
        return latents

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """min(SNR, γ), divided by what the prediction type weighs already; 1 where SNR is zero."""
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=gamma)
        divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        weights = clipped / divisors[self.scheduler.config.prediction_type]
        # as in the code of Hang et al.: 0 would leave unlearned the pure noise that sampling starts from
        return torch.where(snr > 0, weights, 1.0)

    def steps(self, num_steps: int, latents: torch.Tensor) -> list[Step]:
        # not every scheduler's class computes the cumulative products
        alphas = DDIMScheduler.from_config(self.config).alphas_cumprod.to(latents.device)
        timesteps = evenly_spaced_timesteps(self.num_train_timesteps, num_steps)
        return ddim_steps(alphas, timesteps, self.scheduler.config.prediction_type)


class RectifiedFlow(Noising):
    """Straight lines between images and noise: `x_t = (1 - sigma) x_0 + sigma noise`; models predict their velocity
    `noise - x_0` (Liu et al. 2022, arXiv 2209.03003).

    Timesteps are shifted towards noise as the scheduler's `shift` says (Esser et al. 2024, arXiv 2403.03206, equation
    23), and not by the images' size.
    """

    is_diffusion = False

    def __init__(self, scheduler_config: Mapping[str, Any]):
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config, use_dynamic_shifting=False)
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.sigmas = self.scheduler.sigmas.flip(0)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        sigma = self._sigmas(timesteps).to(latents)[:, None, None, None]
        return (1 - sigma) * latents + sigma * noise

    def told(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self._sigmas(timesteps) * self.num_train_timesteps

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def min_snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        raise ValueError("Min-SNR weighting is not for rectified flow; leave out `snr_gamma`.")

    def steps(self, num_steps: int, latents: torch.Tensor) -> list[Step]:
        """Euler's, at the scheduler's own timesteps."""
        self.scheduler.set_timesteps(num_steps)
        return self._euler_steps()

    def _euler_steps(self) -> list[Step]:
        sigmas = self.scheduler.sigmas.tolist()
        return [Step(t * self.num_train_timesteps, 1.0, s - t) for t, s in pairwise(sigmas)]

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.sigmas.to(timesteps.device)[timesteps]


class FluxFlow(RectifiedFlow):
    """The rectified flow of FLUX.1. Where its scheduler shifts timesteps by the size of images, only the steps of the
    ODE are shifted, as its pipeline does; training draws from the timesteps without a shift, as diffusers' own scripts
    do.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]):
        super().__init__(scheduler_config)
        if scheduler_config.get("use_dynamic_shifting"):
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
            self.sigmas = self.scheduler.sigmas.flip(0)

    def steps(self, num_steps: int, latents: torch.Tensor) -> list[Step]:
        config = self.scheduler.config
        num_patches = latents.shape[2] * latents.shape[3] // 4
        mu = calculate_shift(
            num_patches, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
        )
        # the pipeline's
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
        return self._euler_steps()


def evenly_spaced_timesteps(num_train_timesteps: int, num_steps: int) -> list[int]:
    """`num_steps + 1` timesteps from the last one down to the first: a clean image counts as one at timestep 0."""
    steps = torch.linspace(num_train_timesteps - 1, 0, num_steps + 1)
    return [int(step) for step in steps.round()]


def ddim_steps(alphas: torch.Tensor, timesteps: list[int], prediction_type: str) -> list[Step]:
    """The steps of DDIM between timesteps, where `alphas` are the scheduler's cumulative products."""
    return [Step(t, *ddim_coefficients(alphas[t], alphas[s], prediction_type)) for t, s in pairwise(timesteps)]


def ddim_coefficients(
    alpha_t: torch.Tensor, alpha_s: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `a` and `b` of a DDIM step `x_s = a x_t + b model(x_t, t)`.

    With angles `phi_t = arccos(sqrt(alpha_t))`, the step (Song et al. 2020, arXiv 2010.02502, equation 12 with sigma =
    0) is a rotation by `phi_t - phi_s`, also where the terminal SNR is zero (Salimans and Ho 2022, arXiv 2202.00512,
    appendix D): `x_s = cos(phi_t - phi_s) x_t - sin(phi_t - phi_s) v(x_t, t)`.

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
