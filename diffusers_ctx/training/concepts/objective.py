"""What is minimised while the concepts are learned: a small VAE around the module, told what contexts differ in.

Four terms, each against one way to fail:

- The evidence bound alone lets any entangled code settle before the mechanisms have a say.
- The contrast between contexts, for which only what an intervention changed is of use, leads each concept to its node.
- The match of the noise in each context to N(0, I) makes noise drawn from the prior mean what abducted noise means.
- The match of what such noise is decoded to with the context's images sees what is left of dependence between nodes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ...context import ContextModule
from ..config import ContextConfig
from .losses import prior_matching_loss, sorted_distance


# latents are averaged to one of these sizes: concepts are seen from afar, and the decoder, which doubles, stays light
_SIZES = (4, 8, 16)


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
        self.size = max(size for size in _SIZES if size <= max(latent_size, _SIZES[0]))
        self.dimensions = latent_channels * self.size**2
        self.latent_channels = latent_channels
        self.decoder = self.create_decoder()
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
        """Loss and figures to log.

        Args:
            latents: (B, C, h, w), sorted by context.
            labels: (B,), the row of `contexts` that each image belongs to.
            eps: standard normal numbers (B, N, d_z) to draw from the posterior with.
            reference: standard normal numbers (B, N, d_z) to compare the draws with, and to decode.
            directions: (N d_z, P) unit vectors to compare draws along.
            latent_directions: (C s s, P) unit vectors to compare decoded latents along; `s` is `size`.
            warm_up: factor of β, from 0 to 1.
            features: (B, F, h', w'), what the posterior sees; by default the latents.
        """
        mask = self.contexts[labels]
        target = self.targets(latents)
        seen = latents if features is None else features
        posterior = self.context_module.posterior(seen, mask)
        z = posterior.at(eps)
        mse, kl = F.mse_loss(self.decode(z, mask), target), posterior.kl()
        contrast = self.contrast(seen, labels)
        mismatch = prior_matching_loss(z, reference, directions, len(self.contexts))
        generated = self.decode(reference, mask)
        misfit = sorted_distance(generated, target, latent_directions, len(self.contexts))
        causal = self.context_module.causal
        loss = (
            self.likelihood_loss(mse)
            + self.config.kl_weight * warm_up * kl.sum(dim=1).mean()
            + self.config.contrastive_weight * contrast
            + self.config.matching_weight * mismatch
            + self.config.generation_weight * misfit
            + self.config.acyclicity_weight * causal.acyclicity()
            + self.config.sparsity_weight * causal.group_lasso()
        )
        figures = {"reconstruction": mse, "contrast": contrast, "mismatch": mismatch, "misfit": misfit}
        figures["kl"] = kl.mean(dim=0)
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def create_decoder(self) -> LightDecoder:
        """A new decoder of node values to small latents."""
        nodes, _ = self.context_module.noise_shape
        return LightDecoder(nodes, self.context_module.config.concept_dim, self.latent_channels, self.size)

    def targets(self, latents: torch.Tensor) -> torch.Tensor:
        """The small latents (B, C, s, s) that the decoder aims at."""
        return F.adaptive_avg_pool2d(latents, self.size)

    def likelihood_loss(self, mse: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of a Gaussian at its best variance, up to a constant (Rybkin et al. 2021, arXiv
        2006.13202, equation 5), so that a KL term weighs what it should, whatever the scale of the latents."""
        return self.dimensions / 2 * mse.log()

    def contrast(self, seen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of guessing an image's context from its values, by Bayes' rule with equal priors.

        The values' volume cancels, and so do all mechanisms but those that an intervention replaced (in the manner of
        Buchholz et al. 2023, arXiv 2306.02235, section 5). Zero where the posterior is amortized: its values depend
        on the context that would have to be guessed.
        """
        if self.config.posterior_type != "inverse":
            return seen.new_zeros(())
        log_densities = self.context_module.log_prob(self.context_module.read_values(seen), self.contexts)
        return F.cross_entropy(log_densities, labels)

    def decode(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Small latents (B, C, s, s) that noise (B, N, d_z) stands for in the contexts of the masks (B, K)."""
        return self.decoder(self.context_module.concept_values(z, mask))
