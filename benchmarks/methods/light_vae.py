"""The paper's own setting: a context module inside a light convolutional VAE, without any diffusion.

It also shows that the module is independent of the backbone: any decoder can read its tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from diffusers_ctx import ContextModule
from diffusers_ctx.context import intervention_mask
from diffusers_ctx.data import ContextBalancedSampler, quad
from diffusers_ctx.training.concepts.losses import gaussian_likelihood_loss

from .quad_setting import QuadSetting
from .setting import Sampler, in_batches


TOKEN_DIM = 32
BATCH_SIZE = 126  # 18 images of each context
LEARNING_RATE = 1e-3
# of the likelihood. At 1, the KL divergence weighs so little against many pixels that the noise of images never
# matches its prior; starting with the last weight, the noise encodes the interventions before the mechanisms can
FIRST_WEIGHT, LAST_WEIGHT = 3e-4, 3e-3
_WIDTH = 64
_PATCH = 4  # pixels; convolutions see a patch as one: sixteen times as many steps in the same time


def create_module() -> ContextModule:
    """The paper's form: expressive layers, reduced form, and a context-conditioned posterior."""
    return ContextModule(
        quad.CONCEPTS,
        token_dim=TOKEN_DIM,
        causal_form="reduced_form",
        expressive_depth=2,
        posterior_type="amortized",
        posterior_in_channels=3 * _PATCH**2,
        posterior_sample_size=quad.RESOLUTION // _PATCH,
    )


def create_decoder(module: ContextModule) -> nn.Sequential:
    """Tokens (B, N T D) to images (B, 3, 64, 64)."""
    nodes, tokens, dim = module.tokens_shape
    layers: list[nn.Module] = [
        nn.Linear(nodes * tokens * dim, _WIDTH * 16),
        nn.SiLU(),
        nn.Unflatten(1, (_WIDTH, 4, 4)),
    ]
    for _ in range(2):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(_WIDTH, 3 * _PATCH**2, 3, padding=1), nn.PixelShuffle(_PATCH))


@dataclass(frozen=True)
class LightVae:
    """A VAE whose latent code is the module's exogenous noise.

    Attributes:
        seconds: duration of the training: that of both stages of a context adapter.
    """

    seconds: float

    def steps(self, setting: QuadSetting) -> None:
        """As many as fit in the time."""

    def train(self, setting: QuadSetting, folder: Path) -> None:
        torch.manual_seed(setting.seed)
        images = [
            quad.generate(names, setting.images_per_context, setting.seed + offset, setting.dependent).images
            for offset, names in enumerate(quad.contexts().values())
        ]
        masks = torch.cat([intervention_mask(list(x), quad.CONCEPTS, 1) for x in quad.contexts().values()])
        pixels, count = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), setting.images_per_context
        sampler = ContextBalancedSampler([name for name in quad.contexts() for _ in range(count)], setting.seed)
        module = create_module()
        decoder = create_decoder(module)
        parameters = [*module.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
        log = SummaryWriter(folder / "logs")
        start, step = time.monotonic(), 0
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for rows in torch.tensor(list(sampler)).split(BATCH_SIZE):
                left = 1 - (time.monotonic() - start) / self.seconds
                if left <= 0:
                    log.close()
                    return self._save(module, decoder, folder, step)
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * min(1, 5 * left)
                weight = likelihood_weight(1 - left)
                loss = negative_elbo(module, decoder, pixels[rows] / 127.5 - 1, masks[rows // count], weight)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 50.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                log.add_scalar("loss", loss.item(), step)

    def load(self, setting: QuadSetting, folder: Path) -> Sampler:
        module, decoder, _ = torch.load(folder / "vae.pt", weights_only=False)

        @torch.no_grad()
        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            mask = intervention_mask(list(interventions), quad.CONCEPTS, 1)

            def sample_batch(batch: list[str], generator: torch.Generator) -> np.ndarray:
                z = torch.randn(len(batch), *module.noise_shape, generator=generator)
                decoded = decoder(module(z, mask.expand(len(batch), -1)).flatten(1))
                return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()

            return in_batches(sample_batch, captions, seed)

        return sample

    def _save(self, module: ContextModule, decoder: nn.Module, folder: Path, steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save((module, decoder, steps), folder / "vae.pt")


def likelihood_weight(progress: float) -> float:
    """Weight at a share `progress` of the training: grows exponentially over its first half."""
    return FIRST_WEIGHT * (LAST_WEIGHT / FIRST_WEIGHT) ** min(1.0, 2 * progress)


def negative_elbo(
    module: ContextModule, decoder: nn.Module, pixels: torch.Tensor, mask: torch.Tensor, weight: float
) -> torch.Tensor:
    """Negative ELBO, with the Gaussian likelihood at its best variance, as in learning the concepts.

    `weight` is the weight 1 / β of the likelihood.
    """
    posterior = module.posterior(F.pixel_unshuffle(pixels, _PATCH), mask)
    z = posterior.at(torch.randn(len(pixels), *module.noise_shape))
    error = F.mse_loss(decoder(module(z, mask).flatten(1)), pixels)
    return weight * gaussian_likelihood_loss(error, pixels[0].numel()) + posterior.kl().sum(dim=1).mean()
