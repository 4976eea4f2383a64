"""What is minimised: the two losses, each a module whose forward pass is all that a process computes in a step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ..context import ContextModule


class LightDecoder(nn.Module):
    """Decodes concept values (B, N, d_c) to small latents (B, C, s, s); used in training and then thrown away."""

    def __init__(self, num_nodes: int, concept_dim: int, channels: int, size: int, width: int = 64):
        super().__init__()
        self.width = width
        self.project = nn.Sequential(
            nn.Linear(num_nodes * concept_dim, 256), nn.SiLU(), nn.Linear(256, width * 16), nn.SiLU()
        )
        layers: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        for _ in range(round(math.log2(size / 4))):
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def forward(self, concept_values: torch.Tensor) -> torch.Tensor:
        return self.layers(self.project(concept_values.flatten(1)).unflatten(1, (self.width, 4, 4)))


class AbductionObjective(nn.Module):
    r"""The evidence lower bound of a small VAE around the context module, on latents:

        D/2 log MSE(x, decoder(c(z, m))) + β KL(q(z | x, m) ‖ N(0, I)) + penalties on the graph,  z ~ q

    The Gaussian likelihood has its best variance (Rybkin et al. 2021, arXiv 2006.13202, equation 5), so that β = 1 is
    the bound itself whatever the scale of the latents. It teaches the module what the concepts are before the UNet
    listens: in a diffusion loss, most of which does not depend on the context, that signal drowns.

    Args:
        context_module: the module.
        latent_channels: channels of the latents.
        latent_size: height and width of the latents, which are averaged down to at most 16.
        acyclicity_weight: weight of the penalty on cycles.
        sparsity_weight: weight of the group lasso on the causal layer's blocks.
    """

    def __init__(
        self,
        context_module: ContextModule,
        latent_channels: int,
        latent_size: int,
        acyclicity_weight: float,
        sparsity_weight: float,
    ):
        super().__init__()
        self.size = min(latent_size, 16)
        self.context_module = context_module
        nodes, _ = context_module.noise_shape
        self.decoder = LightDecoder(nodes, context_module.config.concept_dim, latent_channels, self.size)
        self.acyclicity_weight = acyclicity_weight
        self.sparsity_weight = sparsity_weight

    def forward(
        self, latents: torch.Tensor, mask: torch.Tensor, noise: torch.Tensor, kl_weight: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and figures to log, from latents (B, C, h, w), masks (B, K) and standard normal noise (B, N, d_z)."""
        posterior = self.context_module.abduct(latents, mask)
        values = self.context_module.concept_values(posterior.at(noise), mask)
        target = F.adaptive_avg_pool2d(latents, self.size)
        mse = F.mse_loss(self.decoder(values), target)
        kl = posterior.kl()
        causal = self.context_module.causal
        penalty = self.acyclicity_weight * causal.acyclicity() + self.sparsity_weight * causal.group_lasso()
        loss = target[0].numel() / 2 * mse.log() + kl_weight * kl.sum(dim=1).mean() + penalty
        return loss, {"abduction_mse": mse.detach(), "kl": kl.detach().mean(dim=0)}


class DiffusionObjective(nn.Module):
    """The diffusion loss of a UNet that is told the context's tokens, with noise from the posterior.

    Args:
        unet: the UNet with a context module attached.
        context_module: the module.
        scheduler: the noise schedule; its prediction type is what the UNet predicts.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), or `None`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        context_module: ContextModule,
        scheduler: DDPMScheduler,
        snr_gamma: float | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.snr_gamma = snr_gamma
        # the UNet owns the module; in a tuple it is not registered again, which would save and synchronise it twice
        self._context_module = (context_module,)

    def forward(
        self,
        latents: torch.Tensor,
        mask: torch.Tensor,
        text: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        exogenous: torch.Tensor,
    ) -> torch.Tensor:
        """The loss, from latents and noise (B, C, h, w), masks (B, K), text (B, L, D), timesteps (B,) and standard
        normal numbers `exogenous` (B, N, d_z) to draw from the posterior with."""
        (context_module,) = self._context_module
        z = context_module.abduct(latents, mask).at(exogenous)
        tokens = context_module(z, mask)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, text, added_cond_kwargs={"image_embeds": [tokens]}).sample
        losses = F.mse_loss(prediction.float(), self._target(latents, noise, timesteps).float(), reduction="none")
        return (losses.mean(dim=(1, 2, 3)) * self._weights(timesteps)).mean()

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
        """Loss weights (B,): min(SNR, γ), divided by what the prediction type weighs already."""
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        divisors = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
        return clipped / divisors[self.scheduler.config.prediction_type]
