"""Where the concepts are in an image's code: an invertible map to node values, found by what contexts differ in.

A network that is only asked to tell contexts apart may fold: where an intervention narrows a concept more than it
moves it, the distance |c - m| from the intervened mean tells contexts apart as well as c does, and is often easier to
see. Its sign is then lost to other nodes. An invertible map of a code that has all of the image in it cannot fold.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from ..context import ContextModule, log_standard_normal
from .config import ContextConfig
from .distances import context_mismatch, unit_directions
from .noise import KeyedNoise


_LAYERS = 6
_WIDTH = 64
_STEPS_FACTOR = 2  # steps are cheap: there are no images in them
_IMAGES_PER_CONTEXT = 128  # in a step, with repetition where there are fewer
_LEARNING_RATE = 2e-3
_MECHANISMS_LEARNING_RATE = 1e-2
# small: most of a code's likelihood is in what no context differs in
_LIKELIHOOD_WEIGHT = 0.05
_CONTRAST_FACTOR = 3  # to the weight that the contrast has later, beside the reconstruction


@dataclass(frozen=True)
class ImageCodes:
    """Gaussians (n, D) over the codes of images, and which context each is of.

    Attributes:
        mean: (n, D).
        std: (n, D).
        labels: (n,), the context's number.
    """

    mean: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor


class InvertibleLinear(nn.Module):
    """`y = W x + b`; `W` starts as a random rotation."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(dim, dim))[0])
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        log_volume = torch.linalg.slogdet(self.weight).logabsdet
        return F.linear(x, self.weight, self.bias), log_volume.expand(len(x))


class AffineCoupling(nn.Module):
    """Scales and shifts the second half of a vector by functions of the first (Dinh et al. 2017, arXiv 1605.08803,
    equations 4 and 5); starts as the identity."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.kept = dim // 2
        sizes = [self.kept, width, width]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        last = nn.Linear(width, 2 * (dim - self.kept))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self.layers(kept).chunk(2, dim=1)
        log_scale = 2 * torch.tanh(log_scale / 2)
        return torch.cat([kept, changed * log_scale.exp() + shift], dim=1), log_scale.sum(dim=1)


class InvertibleMap(nn.Module):
    """Linear maps with couplings between them: (B, D) to (B, D)."""

    def __init__(self, dim: int, num_layers: int = _LAYERS, width: int = _WIDTH):
        super().__init__()
        layers: list[nn.Module] = [InvertibleLinear(dim)]
        if dim > 1:
            for _ in range(num_layers):
                layers += [AffineCoupling(dim, width), InvertibleLinear(dim)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (B, D), and `log |det dy/dx|` (B,)."""
        log_volume = x.new_zeros(len(x))
        for layer in self.layers:
            x, volume = layer(x)
            log_volume = log_volume + volume
        return x, log_volume


def learn_values(
    context_module: ContextModule,
    codes: ImageCodes,
    contexts: torch.Tensor,
    options: ContextConfig,
    seed: int,
    show_progress: bool = True,
) -> torch.Tensor:
    """Learns mechanisms and causal layer together with a map from codes to node values.

    What is minimised: the contrast between contexts, the mismatch of the noise to its prior in each of them, the
    negative log-likelihood of the codes, and the causal layer's penalties.

    Args:
        context_module: the module; its mechanisms and causal layer are changed.
        codes: what is known of the images, of as many dimensions as all node values together.
        contexts: (C, K), the masks of the contexts.
        options: weights of the terms; there are two steps for each of its `abduction_steps`.
        seed: seed of everything random.
        show_progress: whether to show a progress bar.

    Returns:
        Node values (n, N, d) of the images' mean codes.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    device, shape = contexts.device, context_module.noise_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = InvertibleMap(codes.mean.shape[1]).to(device)
    mechanisms = [*context_module.mechanism.parameters(), *context_module.causal.parameters()]
    groups = [
        {"params": flow.parameters(), "lr": _LEARNING_RATE},
        {"params": mechanisms, "lr": _MECHANISMS_LEARNING_RATE},
    ]
    optimizer, steps = torch.optim.Adam(groups), _STEPS_FACTOR * options.abduction_steps
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    rows_of = [torch.nonzero(codes.labels == label)[:, 0] for label in range(len(contexts))]
    labels = torch.arange(len(contexts), device=device).repeat_interleave(_IMAGES_PER_CONTEXT)
    for step in tqdm(range(steps), desc="Telling concepts apart", disable=not show_progress):
        # the numbers after those of the steps on images
        random = KeyedNoise(seed, -1 - options.abduction_steps - step)
        rows = _draw_rows(rows_of, random)
        drawn = codes.mean[rows] + codes.std[rows] * random.normal(*codes.mean[rows].shape)
        reference = random.normal(len(rows), *shape)
        directions = unit_directions(random, reference[0].numel())
        values, log_volume = flow(drawn.to(device))
        loss = _loss(
            context_module,
            values.unflatten(1, shape),
            log_volume,
            labels,
            contexts,
            (reference.to(device), directions.to(device)),
            options,
        )
        if not loss.isfinite():
            raise FloatingPointError(f"The loss is not finite at step {step} of telling concepts apart.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*flow.parameters(), *mechanisms], 20.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return flow(codes.mean.to(device))[0].unflatten(1, shape).cpu()


def _draw_rows(rows_of: list[torch.Tensor], random: KeyedNoise) -> torch.Tensor:
    """Equally many rows of every context, in the order of contexts."""
    drawn = random.uniform(len(rows_of) * _IMAGES_PER_CONTEXT).view(len(rows_of), -1)
    return torch.cat([rows[(uniform * len(rows)).long()] for rows, uniform in zip(rows_of, drawn)])


def _loss(
    context_module: ContextModule,
    values: torch.Tensor,
    log_volume: torch.Tensor,
    labels: torch.Tensor,
    contexts: torch.Tensor,
    prior: tuple[torch.Tensor, torch.Tensor],
    options: ContextConfig,
) -> torch.Tensor:
    noise, log_volumes = context_module.noise_of(values, contexts)
    log_densities = log_standard_normal(noise) + log_volumes
    own = torch.arange(len(values), device=values.device)
    likelihood = (log_densities[own, labels] + log_volume).mean()
    causal = context_module.causal
    return (
        _CONTRAST_FACTOR * options.contrastive_weight * F.cross_entropy(log_densities, labels)
        + options.matching_weight * context_mismatch(noise[own, labels], *prior, len(contexts))
        - _LIKELIHOOD_WEIGHT * likelihood
        + options.acyclicity_weight * causal.acyclicity()
        + options.sparsity_weight * causal.group_lasso()
    )
