"""The diffusion loss, as a module whose forward pass is all that a process computes in a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ...adapter import add_context_tokens
from ...context import ContextModule
from ...pipelines import CompositionMixin, Conditioner


PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class CaptionEncoder(nn.Module):
    """Tells the UNet what captions say, with gradients: where it is a part of the objective, text encoders learn."""

    def __init__(self, pipeline: CompositionMixin):
        super().__init__()
        self.text_encoders = nn.ModuleDict(pipeline.text_encoders)
        self._conditioner = Conditioner.of(pipeline)

    @torch.compiler.disable  # tokenizers cannot be compiled
    def forward(self, captions: list[str], geometry: torch.Tensor) -> dict[str, Any]:
        return self._conditioner.unet_kwargs(self._conditioner.encode_captions(captions), geometry)


class DiffusionObjective(nn.Module):
    """The diffusion loss of a UNet that is told the context's tokens, with noise from the posterior.

    Args:
        unet: the UNet with a context module attached.
        context_module: the module.
        scheduler: the noise schedule; its prediction type is what the UNet predicts.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), or `None`.
        caption_encoder: encodes captions in the forward pass, or `None` if they come encoded.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        context_module: ContextModule,
        scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
        caption_encoder: CaptionEncoder | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        self.caption_encoder = caption_encoder
        # the UNet owns the module; in a tuple it is not registered again, which would save and synchronise it twice
        self._context_module = (context_module,)

    def forward(
        self,
        latents: torch.Tensor,
        mask: torch.Tensor,
        conditions: dict[str, Any],
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        eps: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted mean of `losses`; with a caption encoder, `conditions` are the arguments that it takes."""
        if self.caption_encoder is not None:
            conditions = self.caption_encoder(**conditions)
        losses = self.losses(latents, mask, conditions, noise, timesteps, eps, features)
        return (losses * self._weights(timesteps)).mean()

    def losses(
        self,
        latents: torch.Tensor,
        mask: torch.Tensor,
        conditions: dict[str, Any],
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        eps: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Each image's loss (B,), without the weights of training.

        Args:
            latents: (B, C, h, w).
            mask: (B, K).
            conditions: what else the UNet is told, as keyword arguments of its call.
            noise: (B, C, h, w), standard normal.
            timesteps: (B,).
            eps: (B, N, d_z), standard normal numbers to draw from the posterior with.
            features: (B, F, h', w'), what the posterior sees; by default the latents.
        """
        (context_module,) = self._context_module
        z = context_module.posterior(latents if features is None else features, mask).at(eps)
        tokens = context_module(z, mask)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, **add_context_tokens(conditions, tokens)).sample
        losses = F.mse_loss(prediction.float(), self._target(latents, noise, timesteps).float(), reduction="none")
        return losses.mean(dim=(1, 2, 3))

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        if prediction_type == "sample":
            return latents
        raise ValueError(f"Unknown prediction type '{prediction_type}'.")

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
