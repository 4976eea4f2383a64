"""Which concept causes which, given the values of all: mechanisms and causal layer by maximum likelihood.

While values are still being found, the graph settles with them, and hardly turns an edge round afterwards. Once they
are known, a linear Gaussian model of them takes seconds to fit from several starts, and its likelihood tells which
start led to the right graph.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...context import ContextModule, inverse_mechanisms
from ...keyed_random import keyed_generator
from ..config import MOST_CONCEPT_STEPS, ContextConfig
from .losses import graph_penalty


_STEPS_SHARE = 1 / 3  # steps besides those that see images
_LEARNING_RATE = 5e-2
_RANDOM_STARTS = 8
_RANDOM_SCALE = 0.3
# cycles are cheap at first, so that an edge can turn round by way of one, and expensive in the end
_FIRST_ACYCLICITY, _LAST_ACYCLICITY = 0.01, 4.0
_SPARSITY = 0.03  # nats; among graphs that explain the values about as well, the one with fewer edges
_LEAST_VARIANCE = 1e-3  # added to that of values: few images would have distributions of no width


@dataclass(frozen=True)
class Moments:
    """What a linear Gaussian model needs to know of node values, in each of C contexts.

    Attributes:
        mean: (C, D).
        second: (C, D, D), the mean of `v v^T`.
    """

    mean: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, labels: torch.Tensor) -> Moments:
        """Those of values (n, N, d), each of the context that its label (n,) numbers."""
        groups = [values[labels == label].flatten(1) for label in labels.unique()]
        return cls(
            torch.stack([group.mean(dim=0) for group in groups]),
            torch.stack([group.T @ group / len(group) for group in groups]),
        )


class LinearGaussianSCM(nn.Module):
    """Mechanisms and causal layer of a context module, as a density of node values.

    Args:
        context_module: the module; there must be no expressive layers.
    """

    def __init__(self, context_module: ContextModule):
        super().__init__()
        self.mechanism = context_module.mechanism
        self.causal = context_module.causal

    def forward(
        self, moments: Moments, contexts: torch.Tensor, acyclicity_weight: float = 0.0, sparsity_weight: float = 0.0
    ) -> torch.Tensor:
        r"""Mean of `-log p(c | m)` in nats, up to a constant, with equal weight for each of the contexts (C, K), plus
        `graph_penalty`.

        With `z = L c - s` of `inverse_mechanisms`, the first is
        `1/2 (tr(L S L^T) - 2 s^T L \mu + s^T s) - log |det L|` for mean `\mu` and second moment `S` of a context.
        """
        whiten, shift, log_volume = inverse_mechanisms(self.mechanism, self.causal, contexts)
        spread = torch.einsum("cij,cjk,cik->c", whiten, moments.second, whiten)
        squares = spread - 2 * torch.einsum("ci,cij,cj->c", shift, whiten, moments.mean) + shift.square().sum(dim=1)
        likelihood = log_volume.sum(dim=1) - squares / 2
        return graph_penalty(self.causal, acyclicity_weight, sparsity_weight) - likelihood.mean()


def fit_scm(
    context_module: ContextModule,
    values: torch.Tensor,
    labels: torch.Tensor,
    contexts: torch.Tensor,
    options: ContextConfig,
    seed: int,
) -> None:
    """Fits mechanisms and causal layer to node values; of several starts, the best is taken.

    Args:
        context_module: the module, without expressive layers; its mechanisms and causal layer are changed.
        values: (n, N, d), nodes' values of the images.
        labels: (n,), the row of `contexts` that each image belongs to.
        contexts: (C, K), the masks.
        options: weights of the penalties on cycles and edges; there is a step for three of its `concept_steps`.
        seed: seed of the random starts.

    The module stays as it is if no fit is finite.
    """
    # on the CPU: the matrices are too small for other devices
    moments, contexts = Moments.of(values.cpu(), labels.cpu()), contexts.cpu()
    moments = replace(moments, second=moments.second + _LEAST_VARIANCE * torch.eye(moments.second.shape[1]))
    sparsity = options.sparsity_weight + (_SPARSITY if context_module.config.graph is None else 0.0)
    starts = _starts(LinearGaussianSCM(context_module), seed)
    weights, buffers = torch.func.stack_module_state(starts)

    def losses(progress: float) -> torch.Tensor:
        schedule = _FIRST_ACYCLICITY + (_LAST_ACYCLICITY - _FIRST_ACYCLICITY) * min(1.0, 2 * progress)
        arguments = (moments, contexts, options.acyclicity_weight * schedule, sparsity)
        return torch.vmap(lambda *state: torch.func.functional_call(starts[0], state, arguments))(weights, buffers)

    steps = max(1, round(_STEPS_SHARE * (options.concept_steps or MOST_CONCEPT_STEPS)))
    optimizer = torch.optim.Adam(weights.values(), lr=_LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        losses(step / steps).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss, best = losses(1.0).nan_to_num(nan=math.inf).min(dim=0)
    if loss.isfinite():
        LinearGaussianSCM(context_module).load_state_dict({name: weight[best] for name, weight in weights.items()})


def _starts(model: LinearGaussianSCM, seed: int) -> list[LinearGaussianSCM]:
    """The model as it is, without edges, and with random ones."""
    starts = [deepcopy(model).cpu() for _ in range(2 + _RANDOM_STARTS)]
    generator = keyed_generator(seed, "scm")
    with torch.no_grad():
        for number, start in enumerate(starts[1:]):
            allowed = start.causal.allowed
            for name, blocks in start.causal.named_parameters():
                noise = torch.randn(blocks.shape, generator=generator) * allowed[:, : blocks.shape[1], None, None]
                # contexts need not tell what all of a reduced form's `blocks_do` are; those stay zero
                is_random = number > 0 and name != "blocks_do"
                blocks.copy_(_RANDOM_SCALE * noise if is_random else torch.zeros_like(blocks))
    return starts
