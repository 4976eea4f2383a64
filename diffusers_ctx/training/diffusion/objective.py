"""The diffusion loss, as a module whose forward pass is all that a process computes in a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from ...adapter import backbone_of
from ...adapter.backbones import Backbone
from ...context import ContextModule
from ...pipelines import CompositionMixin, Conditioner, select_rows
from ..encoding.batch import Batch
from .composition import COMPOSED_SHARE, composition_losses


class CaptionEncoder(nn.Module):
    """Encodes captions into the backbone's conditions, with gradients: as a part of the objective, encoders learn."""

    def __init__(self, pipeline: CompositionMixin):
        super().__init__()
        self._conditioner = Conditioner.of(pipeline)
        self.text_encoders = nn.ModuleDict(self._conditioner.text_encoders)

    @torch.compiler.disable  # tokenizers cannot be compiled
    def forward(self, captions: list[str], geometry: torch.Tensor) -> dict[str, Any]:
        return self._conditioner.caption_kwargs(captions, geometry)


class Draws(NamedTuple):
    """What is drawn at random for a batch, besides its latents.

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
    """The diffusion loss of a model that attends to the context's tokens, with exogenous noise from the posterior.

    Args:
        backbone: the UNet or transformer with a context module attached.
        scheduler: has the noise schedule; its prediction type, if any, is what the model predicts.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv 2303.09556), or `None`.
        composition_weight: weight of the composition loss, where there are combinations to learn.
        caption_encoder: encodes captions in the forward pass, or `None` if they come encoded.
    """

    def __init__(
        self,
        backbone: ModelMixin,
        scheduler: SchedulerMixin,
        snr_gamma: float | None = None,
        caption_encoder: CaptionEncoder | None = None,
        composition_weight: float = 0.0,
    ):
        super().__init__()
        self.component = backbone_of(backbone).component
        setattr(self, self.component, backbone)  # checkpoints have its weights under this name
        self.noising = backbone_of(backbone).noising(scheduler.config)
        self.snr_gamma = snr_gamma
        self.caption_encoder = caption_encoder
        self.composition_weight = composition_weight

    @property
    def context_module(self) -> ContextModule:
        """The module that the backbone owns; as a property it is neither saved nor synchronized twice."""
        module = self._backbone.context_module
        assert module is not None
        return module

    @property
    def _backbone(self) -> Backbone:
        return backbone_of(getattr(self, self.component))

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
            conditions: keyword arguments of the backbone's call other than the context tokens.
            exogenous_noise: (B, N, d_z); by default it is drawn from the posterior.
        """
        z = self._noise(batch, draws) if exogenous_noise is None else exogenous_noise
        tokens = self.context_module(z, batch.mask)
        noisy = self.noising.add_noise(batch.latents, draws.noise, draws.timesteps)
        prediction = self._predict(noisy, draws.timesteps, conditions, tokens)
        target = self.noising.target(batch.latents, draws.noise, draws.timesteps)
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
        timesteps, own = draws.timesteps[rows], select_rows(conditions, len(batch.latents), rows)
        noisy = self.noising.add_noise(batch.latents[rows], draws.noise[rows], timesteps)

        def predict(tokens: torch.Tensor) -> torch.Tensor:
            return self._predict(noisy, timesteps, own, tokens)

        return composition_losses(predict, self.context_module, z, draws.combinations[rows])

    def _predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any], tokens: torch.Tensor
    ) -> torch.Tensor:
        """What the backbone predicts (B, C, h, w) under context tokens (B, N, T, token_dim)."""
        backbone = self._backbone
        return backbone.predict(noisy, self.noising.told(timesteps), backbone.with_tokens(conditions, tokens))

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Loss weights (B,), of min-SNR weighting if it is asked for."""
        if self.snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        return self.noising.min_snr_weights(timesteps, self.snr_gamma)
