"""Where the concepts are in an image's code: a normalizing flow to node values, found by how contexts differ.

A network that is only asked to tell contexts apart may fold: where an intervention narrows a concept more than it
moves it, the distance |c - m| from the intervened mean tells contexts apart as well as c does, and is often easier to
see. Its sign is then lost to other nodes. An invertible map of a code of the whole image cannot fold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from ...context import ContextModule, log_standard_normal
from ...keyed_random import keyed_seed
from ..config import MOST_CONCEPT_STEPS, ContextConfig
from ..run.keyed_noise import KeyedNoise
from .flow import NormalizingFlow
from .initialization import initial_directions
from .losses import contrastive_loss, graph_penalty, prior_matching_loss, unit_directions
from .scm_fit import fit_scm


RUNGS = ((0.1, 6), (0.3, 3), (1.0, 1))
"""Shares of the steps, and how many candidates learn until then."""

_STEPS_FACTOR = 2  # steps are cheap: there are no images in them
_IMAGES_PER_CONTEXT = 128  # in a step, with repetition where there are fewer
_LEARNING_RATE = 2e-3
_MECHANISMS_LEARNING_RATE = 1e-2
_MAX_GRADIENT_NORM = 20.0
# small: most of a code's likelihood is in what no context differs in
_LIKELIHOOD_WEIGHT = 0.05
# not all: the direction in which an intervention shows most may be a fold of its concept
_DIRECTED_CANDIDATES = RUNGS[0][1] // 2
_JUDGED_STEPS = 100


@dataclass(frozen=True)
class ImageCodes:
    """Gaussians over the codes of images.

    Attributes:
        mean: (n, D).
        std: (n, D).
        labels: (n,), the number of each image's context.
    """

    mean: torch.Tensor
    std: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class CodeBatch:
    """The batch that all candidates share in a step.

    Attributes:
        codes: (B, D), sorted by context, equally many of each.
        directions: (D, P) unit vectors for the match with the prior.
        labels: (B,), the row of `contexts` that each code belongs to.
        contexts: (C, K), the masks.
    """

    codes: torch.Tensor
    directions: torch.Tensor
    labels: torch.Tensor
    contexts: torch.Tensor


def search_flow(
    context_module: ContextModule,
    codes: ImageCodes,
    contexts: torch.Tensor,
    options: ContextConfig,
    seed: int,
    show_progress: bool = True,
    before_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Learns mechanisms and causal layer together with a flow from codes to node values.

    Whether the flow finds the concepts depends on where it starts. Successive halving (Jamieson and Talwalkar 2016,
    arXiv 1502.07943) chooses among several candidates: all learn for some steps, then only the better ones go on. Half
    of them start at [`initial_directions`], the others at random. At each of the `RUNGS`, mechanisms and causal layer
    of those that go on are fitted anew, see [`fit_scm`].

    Args:
        context_module: the module; its mechanisms and causal layer are changed.
        codes: of the images, with as many dimensions as all node values together.
        contexts: (C, K), the masks of the contexts.
        options: weights of the terms; there are two steps for each of its `concept_steps`.
        seed: seed of everything random.
        show_progress: whether to show a progress bar.
        before_step: called before each step of the candidates; may raise to stop the search.

    Returns:
        Node values (n, N, d) of the images' mean codes.

    Raises:
        FloatingPointError: if no candidate has a finite loss.
    """
    steps = _STEPS_FACTOR * (options.concept_steps or MOST_CONCEPT_STEPS)
    goals = [max(1, round(share * steps)) for share, _ in RUNGS]
    rows_of = [torch.nonzero(codes.labels == label)[:, 0] for label in range(len(contexts))]
    population = Population(_initial_candidates(context_module, codes, contexts, seed), options, steps)
    with tqdm(total=goals[-1], desc="Telling concepts apart", disable=not show_progress) as progress:
        for start, goal, survivors in zip([0, *goals], goals, [*[count for _, count in RUNGS[1:]], 1]):
            for step in range(start, goal):
                before_step()
                population.step(_draw_batch(codes, rows_of, contexts, KeyedNoise(seed, "search", step)))
                progress.update()
            population.keep_best(survivors)
            population.fit_scms(codes, contexts, seed)
    best = population.candidate(0)
    values = best.values(codes)
    if not values.isfinite().all():
        raise FloatingPointError("Node values are not finite; lower `contrastive_weight`.")
    context_module.load_state_dict(best.context_module.state_dict())
    return values


class Candidate(nn.Module):
    """A flow from codes to node values, and the context module whose mechanisms and causal layer learn with it."""

    def __init__(self, flow: NormalizingFlow, context_module: ContextModule):
        super().__init__()
        self.flow = flow
        self.context_module = context_module

    def forward(self, batch: CodeBatch, options: ContextConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the score by which candidates are compared; more is better.

        The score weighs the likelihood fully: most of the loss is the contrast, which is nearly the same for a flow
        under which concepts do not compose.
        """
        flat, log_volume = self.flow(batch.codes)
        noise, log_volumes = self.context_module.noise_of(
            flat.unflatten(1, self.context_module.noise_shape), batch.contexts
        )
        log_densities = log_standard_normal(noise) + log_volumes
        rows = torch.arange(len(flat), device=flat.device)
        own_noise, own_density = noise[rows, batch.labels], log_densities[rows, batch.labels]
        likelihood = (own_density + log_volume).mean()
        contrast = options.contrastive_weight * contrastive_loss(log_densities, batch.labels)
        mismatch = prior_matching_loss(own_noise, batch.directions, len(batch.contexts))
        loss = (
            contrast
            + options.matching_weight * mismatch
            - _LIKELIHOOD_WEIGHT * likelihood
            + graph_penalty(self.context_module.causal, options.acyclicity_weight, options.sparsity_weight)
        )
        return loss, likelihood - contrast

    @torch.no_grad()
    def values(self, codes: ImageCodes) -> torch.Tensor:
        """Node values (n, N, d) of the images' mean codes, on the CPU."""
        flat, _ = self.flow(codes.mean.to(self.context_module.device))
        return flat.unflatten(1, self.context_module.noise_shape).cpu()


class Population:
    """Candidates that learn together: each of their weights is stacked along a first dimension.

    Candidates do not influence one another: a step changes each of them as it would alone.

    Args:
        candidates: A of them, of the same shapes.
        options: weights of the terms.
        steps: steps of the learning rate's schedule.
    """

    def __init__(self, candidates: list[Candidate], options: ContextConfig, steps: int):
        self.options = options
        self._template = candidates[0]
        stacked, _ = torch.func.stack_module_state(candidates)
        mechanisms = ("context_module.mechanism.", "context_module.causal.")
        self.weights = {name: w for name, w in stacked.items() if name.startswith(("flow.", *mechanisms))}
        groups: list[dict[str, Any]] = [
            {"params": [w for name, w in self.weights.items() if name.startswith("flow.")]},
            {
                "params": [w for name, w in self.weights.items() if name.startswith(mechanisms)],
                "lr": _MECHANISMS_LEARNING_RATE,
            },
        ]
        self._optimizer = torch.optim.Adam(groups, lr=_LEARNING_RATE, fused=True)
        self._schedule = get_scheduler("cosine", self._optimizer, num_warmup_steps=0, num_training_steps=steps)
        self._scores: deque[torch.Tensor] = deque(maxlen=_JUDGED_STEPS)

    def __len__(self) -> int:
        return len(next(iter(self.weights.values())))

    def step(self, batch: CodeBatch) -> None:
        """Takes an optimizer step; candidates whose loss is not finite drop out before it.

        Raises:
            FloatingPointError: if no candidate is left.
        """
        losses, scores = self._losses(batch)
        finite = losses.isfinite()
        if not finite.all():
            self.keep(torch.nonzero(finite)[:, 0])
            losses, scores = self._losses(batch)
        losses.sum().backward()
        clip_each_gradient(self.weights.values(), _MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        self._scores.append(scores.detach())

    def scores(self) -> torch.Tensor:
        """The mean (A,) of each one's last scores."""
        return torch.stack([*self._scores]).mean(dim=0)

    def keep_best(self, count: int) -> None:
        """Keeps this many candidates with the best scores, the best one first."""
        self.keep(self.scores().argsort(descending=True)[:count])

    @torch.no_grad()
    def keep(self, rows: torch.Tensor) -> None:
        """Keeps these candidates, in this order.

        Raises:
            FloatingPointError: if there are none.
        """
        if not len(rows):
            raise FloatingPointError("No flow to node values has a finite loss; lower `contrastive_weight`.")
        kept = {weight: weight[rows].requires_grad_() for weight in self.weights.values()}
        self.weights = {name: kept[weight] for name, weight in self.weights.items()}
        for group in self._optimizer.param_groups:
            group["params"] = [kept[weight] for weight in group["params"]]
        for weight, state in list(self._optimizer.state.items()):
            # the number of steps is a scalar; moments have a row for each candidate
            state = {name: value[rows] if value.ndim else value for name, value in state.items()}
            self._optimizer.state[kept[weight]] = state
            del self._optimizer.state[weight]
        self._scores = deque((scores[rows] for scores in self._scores), maxlen=_JUDGED_STEPS)

    @torch.no_grad()
    def candidate(self, row: int) -> Candidate:
        """One of the candidates, until the next call."""
        for name, weight in self.weights.items():
            self._template.get_parameter(name).copy_(weight[row])
        return self._template

    def fit_scms(self, codes: ImageCodes, contexts: torch.Tensor, seed: int) -> None:
        """Fits each one's mechanisms and causal layer anew to its node values."""
        for row in range(len(self)):
            candidate = self.candidate(row)
            fit_scm(candidate.context_module, candidate.values(codes), codes.labels, contexts, self.options, seed)
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight[row] = candidate.get_parameter(name)

    def _losses(self, batch: CodeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and scores, (A,) each."""

        def one(weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.func.functional_call(self._template, weights, (batch, self.options))

        return torch.vmap(one)(self.weights)


@torch.no_grad()
def clip_each_gradient(weights: Collection[torch.Tensor], max_norm: float) -> None:
    """Scales the gradients of each row of stacked weights (A, ...) to this norm at most, over all weights."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    if (factors < 1).any():
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _initial_candidates(
    context_module: ContextModule, codes: ImageCodes, contexts: torch.Tensor, seed: int
) -> list[Candidate]:
    noise_dim = context_module.config.noise_dim
    directed = initial_directions(codes.mean, codes.std.square(), codes.labels, contexts, noise_dim)
    candidates = []
    for number in range(RUNGS[0][1]):
        with torch.random.fork_rng(devices=[]):
            # not `torch.manual_seed`, which seeds the devices too
            torch.random.default_generator.manual_seed(keyed_seed(seed, "flow", number))
            flow = NormalizingFlow(codes.mean.shape[1])
        if number < _DIRECTED_CANDIDATES:
            flow.start_at(*directed)
        candidates.append(Candidate(flow.to(contexts.device), deepcopy(context_module)))
    return candidates


def _draw_batch(
    codes: ImageCodes, rows_of: list[torch.Tensor], contexts: torch.Tensor, random: KeyedNoise
) -> CodeBatch:
    """The same batch for all candidates, so that they can be compared."""
    rows = _draw_rows(rows_of, random)
    drawn = codes.mean[rows] + codes.std[rows] * random.normal(len(rows), codes.mean.shape[1])
    directions = unit_directions(random, drawn.shape[1])
    labels = torch.arange(len(contexts), device=contexts.device).repeat_interleave(_IMAGES_PER_CONTEXT)
    return CodeBatch(drawn.to(contexts.device), directions.to(contexts.device), labels, contexts)


def _draw_rows(rows_of: list[torch.Tensor], random: KeyedNoise) -> torch.Tensor:
    """Equally many rows of every context, in the order of contexts."""
    drawn = random.uniform(len(rows_of) * _IMAGES_PER_CONTEXT).view(len(rows_of), -1)
    return torch.cat([rows[(uniform * len(rows)).long()] for rows, uniform in zip(rows_of, drawn)])
