"""The loss of the concept stage: a small VAE around the context module, with terms on how contexts differ.

Each term is there for a reason:

- The ELBO alone lets any entangled code settle before the mechanisms take effect.
- The contrastive loss between contexts leads each concept to its node: only what an intervention changed lowers it.
- Matching the noise in each context to N(0, I) gives noise from the prior the same meaning as noise of images.
- Matching latents that are decoded from prior noise to the context's images removes dependence left between nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...context import ContextModule, GaussianPosterior
from ..config import ContextConfig
from .decoders import ConvDecoder, ValueDecoder
from .losses import (
    contrastive_loss,
    gaussian_likelihood_loss,
    graph_penalty,
    prior_matching_loss,
    sorted_distance,
)


# latents are averaged to one of these heights, of half their own where that is as much as eight: concepts show at low
# resolution, and the decoder stays small
_SIZES = (4, 8, 16)


class ConceptObjective(nn.Module):
    """The loss of a step, on a batch with equally many images of every context.

    Args:
        context_module: the module.
        contexts: (C, K), the different masks of the data.
        latent_channels: channels of the latents.
        latent_size: height and width of the latents.
        config: the weights of the terms.
    """

    contexts: torch.Tensor

    def __init__(
        self,
        context_module: ContextModule,
        contexts: torch.Tensor,
        latent_channels: int,
        latent_size: int,
        config: ContextConfig,
    ):
        super().__init__()
        self.context_module = context_module
        self.config = config
        largest = max(min(latent_size, 8), latent_size // 2, _SIZES[0])
        self.size = max(size for size in _SIZES if size <= largest)
        self.dimensions = latent_channels * self.size**2
        self.latent_channels = latent_channels
        self.decoder = ValueDecoder(*self._decoder_shape())
        self.register_buffer("contexts", contexts, persistent=False)

    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor,
        eps: torch.Tensor,
        reference: torch.Tensor,
        directions: torch.Tensor,
        latent_directions: torch.Tensor,
        warm_up: float,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics to track.

        Args:
            latents: (B, C, h, w), sorted by context.
            labels: (B,), the row of `contexts` that each image belongs to.
            eps: standard normal numbers (B, N, d_z) to draw from the posterior with.
            reference: standard normal numbers (B, N, d_z) to decode: samples of the prior.
            directions: (N d_z, P) unit vectors to compare draws from the posterior with the prior along.
            latent_directions: (C s s, P) unit vectors to compare decoded latents along; `s` is `size`.
            warm_up: factor of β, from 0 to 1.
            features: (B, F, h', w'), the posterior's input; by default the latents.

        Returns:
            The loss, and `reconstruction` (mean squared error), `contrastive_loss` (nats), `noise_swd` and
            `latent_swd` (squared distances) and `kl` (N,) in nats.
        """
        options, groups = self.config, len(self.contexts)
        mask, target = self.contexts[labels], self.targets(latents)
        posterior, contrast = self._posterior(latents if features is None else features, labels)
        noise, kl = posterior.at(eps), posterior.kl()
        reconstructed, generated = self.decode(torch.cat([noise, reference]), mask.repeat(2, 1)).chunk(2)
        mse = F.mse_loss(reconstructed, target)
        noise_swd = prior_matching_loss(noise, directions, groups)
        latent_swd = sorted_distance(generated, target, latent_directions, groups)
        loss = (
            self.likelihood_loss(mse)
            + options.kl_weight * warm_up * kl.sum(dim=1).mean()
            + options.contrastive_weight * contrast
            + options.matching_weight * noise_swd
            + options.generation_weight * latent_swd
            + graph_penalty(self.context_module.causal, options.acyclicity_weight, options.sparsity_weight)
        )
        metrics = {
            "reconstruction": mse,
            "contrastive_loss": contrast,
            "noise_swd": noise_swd,
            "latent_swd": latent_swd,
            "kl": kl.mean(dim=0),
        }
        return loss, {name: metric.detach() for name, metric in metrics.items()}

    def create_code_decoder(self) -> ConvDecoder:
        """A decoder for the plain VAE that learns the code, which is thrown away with it."""
        return ConvDecoder(*self._decoder_shape())

    def _decoder_shape(self) -> tuple[int, int, int, int]:
        nodes, _ = self.context_module.noise_shape
        return nodes, self.context_module.config.concept_dim, self.latent_channels, self.size

    def targets(self, latents: torch.Tensor) -> torch.Tensor:
        """The small latents (B, C, s, s) that the decoder aims at."""
        return F.adaptive_avg_pool2d(latents, self.size)

    def likelihood_loss(self, mse: torch.Tensor) -> torch.Tensor:
        """`gaussian_likelihood_loss` of reconstructed targets."""
        return gaussian_likelihood_loss(mse, self.dimensions)

    def decode(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Small latents (B, C, s, s) that noise (B, N, d_z) means in the contexts of the masks (B, K)."""
        return self.decoder(self.context_module.concept_values(z, mask))

    def _posterior(
        self, posterior_input: torch.Tensor, labels: torch.Tensor
    ) -> tuple[GaussianPosterior, torch.Tensor]:
        """Posterior of the noise and contrastive loss of the node values.

        The loss is zero where the posterior is amortized: its values depend on the context that is to be guessed.
        """
        module, mask = self.context_module, self.contexts[labels]
        if module.config.posterior_type != "inverse":
            return module.posterior(posterior_input, mask), mask.new_zeros(())
        values, log_variance = module.read_code(posterior_input)
        contrast = contrastive_loss(module.log_prob(values, self.contexts), labels)
        return module.noise_posterior(values, log_variance, mask), contrast
