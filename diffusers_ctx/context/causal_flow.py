"""What linear mechanisms leave out: the law of their noise, learned from the noise of real images.

Mechanisms and causal layer are linear, so that the noise of images can be read off them. What they cannot say, such as
that a value comes close to its limits, or that a hidden factor is a curved function of the concepts, is left in the
noise `z` that explains real images, which is not quite N(0, I) for that reason. So `z` is made of exogenous noise `e`
that is, node after node in the order of causes:

    z_i = T_i(e_i; c_<i, z_<i)    where concept i is not intervened on, and otherwise    z_i = T_i^do(e_i)

with increasing functions (a causal normalizing flow, Javaloy et al. 2023, arXiv 2306.05415).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .causal import at_least_single
from .layers import NodewiseLinear
from .splines import RationalQuadraticSpline


_BINS = 8
_BOUND = 4.0
_LARGEST_LOG_SCALE = 2.0

ValuesOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Transform = tuple[torch.Tensor, torch.Tensor, RationalQuadraticSpline]


class CausalFlow(nn.Module):
    """Takes exogenous noise (B, N, d) to the noise of the mechanisms (B, N, d), and back. The identity at first.

    Nodes are the concepts, followed by the hidden factors. They are put in the order of causes, hidden factors that
    cause no concept at its end. What nodes depend on:

    - a concept: the *values* of concepts that cause it; the *noise* of all concepts before it that are not intervened
      on, which tells of common causes, and that of hidden factors before it;
    - a hidden factor: the values of all concepts, and the noise of hidden factors, before it.

    So an intervention moves nothing that comes before it. Dimensions of one node's noise do not depend on one another.

    Args:
        num_concepts: concepts, which can be intervened on.
        num_hidden_factors: nodes that follow them.
        dim: width of a node's noise.
        concept_dim: width of a node's values.
        width: hidden width.
    """

    order: torch.Tensor
    hears_values: torch.Tensor
    hears_noise: torch.Tensor
    value_scale: torch.Tensor

    def __init__(self, num_concepts: int, num_hidden_factors: int, dim: int, concept_dim: int, width: int = 48):
        super().__init__()
        nodes = num_concepts + num_hidden_factors
        self.num_concepts = num_concepts
        self.dim = dim
        in_dim, out_dim = num_concepts * (concept_dim + 1) + nodes * dim, dim * (3 * _BINS + 1)
        with torch.random.fork_rng(devices=[]):  # what is drawn after it is the same with and without it
            self.first = NodewiseLinear(nodes, in_dim, width)
            self.middle = NodewiseLinear(nodes, width, width)
            self.last = NodewiseLinear(nodes, width, out_dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.intervened = nn.Parameter(torch.zeros(num_concepts, out_dim))
        self.register_buffer("order", torch.arange(nodes))
        self.register_buffer("hears_values", torch.zeros(nodes, num_concepts))
        self.register_buffer("hears_noise", torch.zeros(nodes, nodes))
        self.register_buffer("value_scale", torch.ones(num_concepts, concept_dim))

    @torch.no_grad()
    def follow(self, strengths: torch.Tensor, least: float) -> torch.Tensor:
        """Takes over the order of causes.

        Args:
            strengths: (N, N), of edges; row = effect, column = cause.
            least: edges that are not stronger are taken for none.

        Returns:
            (N, N), 1 for edges that agree with the order and 0 for those that go against it, which must not be.
        """
        count, nodes = self.num_concepts, range(len(self.order))
        causing = (strengths[:count] > least).any(dim=0).tolist()
        last = [node for node in nodes[count:] if not causing[node]]
        order = _causal_order(strengths, [node for node in nodes if node not in last]) + last
        self.order.copy_(torch.tensor(order))
        self.hears_values.zero_()
        self.hears_noise.zero_()
        forward = torch.zeros_like(strengths)
        for place, node in enumerate(order):
            before = order[:place]
            concepts, hidden = ([x for x in before if (x < count) == is_concept] for is_concept in (True, False))
            self.hears_noise[node, hidden] = 1
            if node < count:
                self.hears_noise[node, concepts] = 1
                self.hears_values[node, concepts] = (strengths[node, concepts] > least).to(self.hears_values)
            else:
                self.hears_values[node, concepts] = 1
            forward[node, before if node not in last else order[: -len(last)]] = 1
        return forward

    def forward(self, noise: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """The mechanisms' noise.

        Args:
            noise: (B, N, d), exogenous.
            mask: (B, K).
            values_of: the values (B, N, d_c) that come of mechanisms' noise (B, N, d) under a mask (B, K).
        """
        z = torch.zeros_like(noise)
        for node in self.order.tolist():
            shift, log_scale, spline = self._transform(self._heard(node, z, mask, values_of)[:, None], mask, [node])
            z[:, node] = (shift + log_scale.exp() * spline.inverse(noise[:, [node]]))[:, 0]
        return z

    def inverse(self, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """The exogenous noise that the mechanisms' noise is made of; arguments as for `forward`."""
        return self.explain(z, self.heard(z, mask, values_of), mask)[0]

    def heard(self, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """What each node depends on (B, N, in_dim), given all of the mechanisms' noise."""
        return torch.stack([self._heard(node, z, mask, values_of) for node in range(len(self.order))], dim=1)

    def explain(self, z: torch.Tensor, heard: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exogenous noise (B, N, d), and each node's `log |de/dz|` (B, N), of the mechanisms' noise and what `heard`
        returns."""
        shift, log_scale, spline = self._transform(heard, mask, list(range(len(self.order))))
        noise, log_derivative = spline((z - shift) * (-log_scale).exp())
        return noise, (log_derivative - log_scale).sum(dim=-1)

    def _heard(self, node: int, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """What a node depends on (B, in_dim); noise that comes after it may be anything."""
        count, mask = self.num_concepts, mask.to(z)
        hears_values, hears_noise = self.hears_values[node].to(z), self.hears_noise[node].to(z)
        # values of what comes before depend on nothing else: edges go forward
        before = torch.cat([torch.maximum(hears_noise[:count], hears_values), hears_noise[count:]])
        values = values_of(z * before[:, None], mask)[:, :count].to(z) / self.value_scale.to(z)
        free = F.pad(1 - mask, (0, len(before) - count), value=1.0) * hears_noise
        parts = [(values * hears_values[:, None]).flatten(1), (z * free[..., None]).flatten(1), free[:, :count]]
        return torch.cat(parts, dim=1)

    def _transform(self, heard: torch.Tensor, mask: torch.Tensor, nodes: list[int]) -> Transform:
        """Shift and log-scale (B, n, d) and splines of nodes, given what each depends on (B, n, in_dim)."""
        x = heard
        for layer in (self.first, self.middle, self.last):
            weight, bias = at_least_single(layer.weight)[nodes], at_least_single(layer.bias)[nodes]
            x = torch.einsum("noi,bni->bno", weight, x if layer is self.first else F.silu(x)) + bias
        hidden = len(self.order) - self.num_concepts
        strength = F.pad(mask.to(x), (0, hidden))[:, nodes, None]
        x = x + strength * (F.pad(at_least_single(self.intervened), (0, 0, 0, hidden))[nodes] - x)
        parts = x.unflatten(-1, (self.dim, -1)).split([1, 1, _BINS, _BINS, _BINS - 1], dim=-1)
        shift, log_scale, widths, heights, slopes = parts
        log_scale = _LARGEST_LOG_SCALE * torch.tanh(log_scale[..., 0] / _LARGEST_LOG_SCALE)
        return shift[..., 0], log_scale, RationalQuadraticSpline.of(widths, heights, slopes, _BOUND)


def _causal_order(strengths: torch.Tensor, nodes: list[int]) -> list[int]:
    """Nodes such that as little as can be is caused by later ones: each time the one that those left cause least."""
    left, order = list(nodes), []
    while left:
        least = min(left, key=lambda node: float(strengths[node, left].sum()))
        order.append(least)
        left.remove(least)
    return order
