"""The diffusion loss, as a module whose forward pass is all that a process computes in a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ...adapter import add_context_tokens, attached_context_module
from ...context import ContextModule
from ...pipelines import CompositionMixin, Conditioner
from ..encoding.batch import Batch
from .composition import COMPOSED_SHARE, composition_losses


class CaptionEncoder(nn.Module):
    """Encodes captions into the UNet's conditions, with gradients: as a part of the objective, text encoders learn."""

    def __init__(self, pipeline: CompositionMixin):
        super().__init__()
        self._conditioner = Conditioner.of(pipeline)
        self.text_encoders = nn.ModuleDict(self._conditioner.text_encoders)

    @torch.compiler.disable  # tokenizers cannot be compiled
    def forward(self, captions: list[str], geometry: torch.Tensor) -> dict[str, Any]:
        return self._conditioner.caption_kwargs(captions, geometry)


class Draws(NamedTuple):
    """What is drawn at random for a batch, beside its latents.

    Attributes:
        noise: (B, C, h, w), added to the latents.
        timesteps: (B,).
        eps: (B, N, d_z), standard normal numbers to draw from the posterior with.
        combinations: (B, K), combinations of interventions that images are to learn, zeros for those without one.
        kept: (B,), ones for images that keep their exogenous noise and zeros for those without; by default all do.
    """

    noise: torch.Tensor
    timesteps: torch.Tensor
    eps: torch.Tensor
    combinations: torch.Tensor | None = None
    kept: torch.Tensor | None = None


class DiffusionObjective(nn.Module):
    """The diffusion loss of a UNet that attends to the context's tokens, with exogenous noise from the posterior.

    Args:
        unet: the UNet with a context module attached.
        scheduler: the noise schedule; its prediction type is what the UNet predicts.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), or `None`.
        composition_weight: weight of the composition loss, where there are combinations to learn.
        caption_encoder: encodes captions in the forward pass, or `None` if they come encoded.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
        caption_encoder: CaptionEncoder | None = None,
        composition_weight: float = 0.0,
    ):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        self.caption_encoder = caption_encoder
        self.composition_weight = composition_weight

    @property
    def context_module(self) -> ContextModule:
        """The module that the UNet owns; as a property it is neither saved nor synchronized twice."""
        module = attached_context_module(self.unet)
        assert module is not None
        return module

    def forward(self, batch: Batch, draws: Draws, conditions: dict[str, Any] | None = None) -> torch.Tensor:
        """The weighted mean of `losses`; a caption encoder makes the conditions, where there is one."""
        if self.caption_encoder is not None:
            conditions = self.caption_encoder(batch.captions, batch.geometry)
        assert conditions is not None
        weights = self._weights(draws.timesteps)
        loss = (self.losses(batch, draws, conditions) * weights).mean()
        if draws.combinations is None or not draws.combinations.any():
            return loss
        rows = draws.combinations.any(dim=1).nonzero()[:, 0]
        composed = (self._composition_losses(batch, draws, conditions, rows) * weights[rows]).sum()
        # a mean, but over as many images in every process and batch
        return loss + self.composition_weight * composed / (COMPOSED_SHARE * len(weights))

    def losses(
        self, batch: Batch, draws: Draws, conditions: dict[str, Any], exogenous_noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Each image's loss (B,), without the weights of training.

        Args:
            batch: the images.
            draws: what is drawn for them.
            conditions: keyword arguments of the UNet's call other than the context tokens.
            exogenous_noise: (B, N, d_z); by default it is drawn from the posterior.
        """
        z = self._noise(batch, draws) if exogenous_noise is None else exogenous_noise
        tokens = self.context_module(z, batch.mask)
        noisy = self.scheduler.add_noise(batch.latents, draws.noise, draws.timesteps)
        prediction = self.unet(noisy, draws.timesteps, **add_context_tokens(conditions, tokens)).sample
        target = self._target(batch.latents, draws.noise, draws.timesteps)
        return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    def _noise(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """Exogenous noise (B, N, d_z), drawn from the posterior."""
        z = self.context_module.posterior(batch.posterior_input, batch.mask).at(draws.eps)
        return z if draws.kept is None else z * draws.kept[:, None, None].to(z)

    def _composition_losses(
        self, batch: Batch, draws: Draws, conditions: dict[str, Any], rows: torch.Tensor
    ) -> torch.Tensor:
        """See [`composition_losses`]; of some images, (R,)."""
        assert draws.combinations is not None
        with torch.no_grad():
            z = self._noise(batch, draws)[rows]
        timesteps, own = draws.timesteps[rows], _select(conditions, rows)
        noisy = self.scheduler.add_noise(batch.latents[rows], draws.noise[rows], timesteps)

        def predict(tokens: torch.Tensor) -> torch.Tensor:
            return self.unet(noisy, timesteps, **add_context_tokens(own, tokens)).sample

        return composition_losses(predict, self.context_module, z, draws.combinations[rows])

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        assert prediction_type == "sample"
        return latents

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weights (B,): min(SNR, γ), divided by what the prediction type weighs already; 1 where SNR is zero."""
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        weights = clipped / divisors[self.scheduler.config.prediction_type]
        # as in the code of Hang et al.: 0 would leave unlearned the pure noise that sampling starts from
        return torch.where(snr > 0, weights, 1.0)


def _select(conditions: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Conditions of some images."""
    return {name: _select(c, rows) if isinstance(c, dict) else c[rows] for name, c in conditions.items()}
