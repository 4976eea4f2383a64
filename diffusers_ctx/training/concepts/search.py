"""Where the concepts are in an image's code: an invertible map to node values, found by what contexts differ in.

A network that is only asked to tell contexts apart may fold: where an intervention narrows a concept more than it
moves it, the distance |c - m| from the intervened mean tells contexts apart as well as c does, and is often easier to
see. Its sign is then lost to other nodes. An invertible map of a code that has all of the image in it cannot fold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ...context import ContextModule, log_standard_normal
from ..config import ContextConfig
from ..run.keyed_noise import KeyedNoise
from .flow import NormalizingFlow
from .initialization import initial_directions
from .losses import prior_matching_loss, unit_directions
from .scm_fit import fit_scm


_STEPS_FACTOR = 2  # steps are cheap: there are no images in them
_IMAGES_PER_CONTEXT = 128  # in a step, with repetition where there are fewer
_LEARNING_RATE = 2e-3
_MECHANISMS_LEARNING_RATE = 1e-2
# small: most of a code's likelihood is in what no context differs in
_LIKELIHOOD_WEIGHT = 0.05
_RUNGS = ((0.1, 6), (0.3, 3), (1.0, 1))  # shares of the steps, and how many attempts get there
_ATTEMPTS = _RUNGS[0][1]
_DIRECTED_ATTEMPTS = _ATTEMPTS // 2  # not all: what shows most of an intervention may be a fold of its concept
_JUDGED_STEPS = 100


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


def search_flow(
    context_module: ContextModule,
    codes: ImageCodes,
    contexts: torch.Tensor,
    options: ContextConfig,
    seed: int,
    show_progress: bool = True,
    before_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Learns mechanisms and causal layer together with a map from codes to node values.

    Where the map starts decides whether it finds the concepts: of several attempts, the better ones go on. Half of
    them start at [`initial_directions`], the others at random. At each of these rungs mechanisms and causal layer are
    fitted anew, see [`fit_scm`].

    Args:
        context_module: the module; its mechanisms and causal layer are changed.
        codes: what is known of the images, of as many dimensions as all node values together.
        contexts: (C, K), the masks of the contexts.
        options: weights of the terms; there are two steps for each of its `concept_steps`.
        seed: seed of everything random.
        show_progress: whether to show a progress bar.
        before_step: called before each step of an attempt; may raise something to end it all.

    Returns:
        Node values (n, N, d) of the images' mean codes.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    steps = _STEPS_FACTOR * options.concept_steps
    directed = initial_directions(
        codes.mean, codes.std.square(), codes.labels, contexts, context_module.config.noise_dim
    )
    starts = [directed if number < _DIRECTED_ATTEMPTS else None for number in range(_ATTEMPTS)]
    attempts = [
        _Attempt(deepcopy(context_module), codes, contexts, options, seed, number, start)
        for number, start in enumerate(starts)
    ]
    goals = [max(1, round(share * steps)) for share, _ in _RUNGS]
    total = sum(number * (goal - before) for (_, number), goal, before in zip(_RUNGS, goals, [0, *goals]))
    with tqdm(total=total, desc="Telling concepts apart", disable=not show_progress) as progress:
        for (_, number), goal in zip(_RUNGS, goals):
            attempts = sorted(attempts, key=lambda attempt: attempt.score, reverse=True)[:number]
            for attempt in attempts:
                attempt.advance(goal, progress, before_step)
    best = attempts[0]
    if not math.isfinite(best.score):
        raise FloatingPointError("The loss of telling concepts apart is not finite; lower `contrastive_weight`.")
    context_module.load_state_dict(best.module.state_dict())
    return best.values()


class _Attempt:
    """A map and a module that learn together, from this linear start of the map or from a random one."""

    def __init__(
        self,
        module: ContextModule,
        codes: ImageCodes,
        contexts: torch.Tensor,
        options: ContextConfig,
        seed: int,
        number: int,
        start: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        self.module, self.codes, self.contexts, self.options, self.seed = module, codes, contexts, options, seed
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(_ATTEMPTS * seed + number)  # no device's
            self.flow = NormalizingFlow(codes.mean.shape[1])
        if start is not None:
            self.flow.start_at(*start)
        self.flow.to(contexts.device)
        self._mechanisms = [*module.mechanism.parameters(), *module.causal.parameters()]
        groups = [
            {"params": self.flow.parameters(), "lr": _LEARNING_RATE},
            {"params": self._mechanisms, "lr": _MECHANISMS_LEARNING_RATE},
        ]
        self._optimizer, steps = torch.optim.Adam(groups), _STEPS_FACTOR * options.concept_steps
        self._schedule = get_scheduler("cosine", self._optimizer, num_warmup_steps=0, num_training_steps=steps)
        self._rows_of = [torch.nonzero(codes.labels == label)[:, 0] for label in range(len(contexts))]
        self._labels = torch.arange(len(contexts), device=contexts.device).repeat_interleave(_IMAGES_PER_CONTEXT)
        self._steps_done = 0
        self.score = -math.inf  # the mean of its last steps; more is better

    def advance(self, step: int, progress: tqdm, before_step: Callable[[], None]) -> None:
        """Goes on to this step, and fits mechanisms and causal layer anew; stops where the loss is not finite."""
        scores = []
        for _ in range(step - self._steps_done):
            before_step()
            loss, score = self._loss()
            scores.append(score.item())
            if not loss.isfinite():
                self.score = -math.inf
                return
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*self.flow.parameters(), *self._mechanisms], 20.0)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
            self._steps_done += 1
            progress.update()
        if scores:
            self.score = fmean(scores[-_JUDGED_STEPS:])
        values = self.values()
        if not values.isfinite().all():
            self.score = -math.inf
            return
        fit_scm(self.module, values, self.codes.labels, self.contexts, self.options, self.seed)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """Node values (n, N, d) of the images' mean codes."""
        flat, _ = self.flow(self.codes.mean.to(self.contexts.device))
        return flat.unflatten(1, self.module.noise_shape).cpu()

    def _loss(self) -> tuple[torch.Tensor, torch.Tensor]:
        device, shape = self.contexts.device, self.module.noise_shape
        # the numbers after those of the steps on images; attempts see the same ones, so that they can be compared
        random = KeyedNoise(self.seed, "search", self._steps_done)
        rows = _draw_rows(self._rows_of, random)
        mean, std = self.codes.mean[rows], self.codes.std[rows]
        drawn = mean + std * random.normal(*mean.shape)
        reference = random.normal(len(rows), *shape)
        directions = unit_directions(random, reference[0].numel())
        values, log_volume = self.flow(drawn.to(device))
        prior = (reference.to(device), directions.to(device))
        return _loss(
            self.module, values.unflatten(1, shape), log_volume, self._labels, self.contexts, prior, self.options
        )


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and what attempts are judged by: the likelihood has its full weight there, since most of the loss is
    the contrast, which is nearly the same for a map under which concepts do not compose."""
    noise, log_volumes = context_module.noise_of(values, contexts)
    log_densities = log_standard_normal(noise) + log_volumes
    own = torch.arange(len(values), device=values.device)
    likelihood = (log_densities[own, labels] + log_volume).mean()
    causal = context_module.causal
    contrast = options.contrastive_weight * F.cross_entropy(log_densities, labels)
    loss = (
        contrast
        + options.matching_weight * prior_matching_loss(noise[own, labels], *prior, len(contexts))
        - _LIKELIHOOD_WEIGHT * likelihood
        + options.acyclicity_weight * causal.acyclicity()
        + options.sparsity_weight * causal.group_lasso()
    )
    return loss, likelihood - contrast
