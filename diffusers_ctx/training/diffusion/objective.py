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
from ...pipelines.inversion import denoise
from ..encoding.batch import Batch, join_batches
from .composed_samples import COMPOSED_SHARE, Composed
from .composition import added_prediction


_SAMPLING_STEPS = 12  # of combinations that are drawn to learn from


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
        kept: (B,), ones for images that keep their exogenous noise and zeros for those without; by default all do.
    """

    noise: torch.Tensor
    timesteps: torch.Tensor
    eps: torch.Tensor
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

    def forward(
        self,
        batch: Batch,
        draws: Draws,
        conditions: dict[str, Any] | None = None,
        composed: Composed | None = None,
    ) -> torch.Tensor:
        """The weighted mean of `losses`, and that of the composition loss where there are samples to learn it on.

        The model is called once for all: with gradient checkpointing, it must not be called again before the backward
        pass.

        Args:
            batch: the images.
            draws: what is drawn for them.
            conditions: keyword arguments of the backbone's call other than the context tokens, with a row for each
                image and sample; made here where there is a caption encoder.
            composed: the samples.
        """
        count, learned, z = len(batch.latents), batch, self._noise(batch, draws)
        noise, timesteps = draws.noise, draws.timesteps
        if composed is not None:
            learned, z = join_batches(batch, composed.batch), torch.cat([z, composed.z.to(z)])
            noise, timesteps = (torch.cat([drawn, drawn[composed.rows]]) for drawn in (noise, timesteps))
        if self.caption_encoder is not None:
            conditions = self.caption_encoder(learned.captions, learned.geometry)
        assert conditions is not None
        noisy = self.noising.add_noise(learned.latents, noise, timesteps)
        target = self.noising.target(learned.latents, noise, timesteps)
        if composed is not None:
            rows = slice(count, None)
            own = select_rows(conditions, len(target), rows)
            target = torch.cat([target[:count], self._sum(noisy[rows], timesteps[rows], own, composed).to(target)])
        tokens = self.context_module(z, learned.mask)
        prediction = self._predict(noisy, timesteps, conditions, tokens)
        losses = _squared_distances(prediction, target) * self._weights(timesteps)
        # a mean, but over as many images in every process and batch
        return losses[:count].mean() + self.composition_weight * losses[count:].sum() / (COMPOSED_SHARE * count)

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
        return _squared_distances(prediction, target)

    def _noise(self, batch: Batch, draws: Draws) -> torch.Tensor:
        """Exogenous noise (B, N, d_z), drawn from the posterior."""
        z = self.context_module.posterior(batch.posterior_input, batch.mask).at(draws.eps)
        return z if draws.kept is None else z * draws.kept[:, None, None].to(z)

    @torch.no_grad()
    def sample_combinations(
        self, noise: torch.Tensor, z: torch.Tensor, combinations: torch.Tensor, conditions: dict[str, Any]
    ) -> torch.Tensor:
        """Latents (B, C, h, w) of combinations (B, K), by [`added_prediction`], from noise of their shape.

        Args:
            noise: (B, C, h, w).
            z: (B, N, d_z), exogenous noise.
            combinations: (B, K), masks of zeros and ones.
            conditions: keyword arguments of the backbone's call other than the context tokens.
        """

        def model(x: torch.Tensor, t: float) -> torch.Tensor:
            def predict(tokens: torch.Tensor) -> torch.Tensor:
                return self._backbone.predict(x, t, self._backbone.with_tokens(conditions, tokens))

            return added_prediction(predict, self.context_module, z, combinations)

        return denoise(model, noise, self.noising.steps(_SAMPLING_STEPS, noise))

    @torch.no_grad()
    def _sum(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditions: dict[str, Any], composed: Composed
    ) -> torch.Tensor:
        """The predictions that samples are to learn (R, C, h, w), see [`added_prediction`]."""

        def predict(tokens: torch.Tensor) -> torch.Tensor:
            return self._predict(noisy, timesteps, conditions, tokens)

        return added_prediction(predict, self.context_module, composed.z, composed.batch.mask)

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


def _squared_distances(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of each image, (B,)."""
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
