"""What linear mechanisms leave out: the law of their noise, learned from the noise of real images.

Mechanisms and causal layer are linear, so that the noise of images can be read off them. What they cannot say, such as
that a value comes close to its limits, or that a hidden factor is a curved function of the concepts, is left in the
noise `z` that explains real images, which is not quite N(0, I) for that reason. So `z` is made of exogenous noise `e`
that is, node after node in the order of causes:

    z_i = T_i(e_i; c_<i, z_<i, m_i)

with increasing functions `T_i` (a causal normalizing flow, Javaloy et al. 2023, arXiv 2306.05415). A concept that is
intervened on hears of no other one, and none hears of the noise of one that is: interventions cut what they cut in the
causal layer.
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
_CAUSE_SHARE = 0.25  # of the strongest edge; weaker ones may be errors of what was learned

ValuesOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CausalFlow(nn.Module):
    """Takes exogenous noise (B, N, d) to the noise of the mechanisms (B, N, d), and back. The identity at first.

    Nodes are the concepts, followed by the hidden factors. What a concept may depend on: its mask; of concepts before
    it that cause it, the values that they have without all that comes later; of all concepts before it that are not
    intervened on, their noise, which tells of causes that both have. A hidden factor depends on the values of all
    concepts and on the noise of hidden factors before it.

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
        in_dim = 1 + num_concepts * concept_dim + nodes * dim
        with torch.random.fork_rng(devices=[]):  # what is drawn after it is the same with and without it
            torch.manual_seed(0)
            self.first = NodewiseLinear(nodes, in_dim, width)
            self.middle = NodewiseLinear(nodes, width, width)
            self.last = NodewiseLinear(nodes, width, dim * (3 * _BINS + 1))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_buffer("order", torch.arange(nodes))
        self.register_buffer("hears_values", torch.zeros(nodes, num_concepts))
        self.register_buffer("hears_noise", torch.zeros(nodes, nodes))
        self.register_buffer("value_scale", torch.ones(num_concepts, concept_dim))

    @torch.no_grad()
    def follow(self, strengths: torch.Tensor) -> None:
        """Takes over the order of causes from the strengths (N, N) of edges; row = effect, column = cause."""
        concepts = range(self.num_concepts)
        order = _causal_order(strengths[: self.num_concepts, : self.num_concepts])
        order += range(self.num_concepts, len(self.order))
        self.order.copy_(torch.tensor(order))
        self.hears_values.zero_()
        self.hears_noise.zero_()
        least = _CAUSE_SHARE * strengths[: self.num_concepts, : self.num_concepts].max()
        for place, node in enumerate(order):
            if node in concepts:
                before = order[:place]
                self.hears_noise[node, before] = 1
                self.hears_values[node, before] = (strengths[node, before] > least).to(self.hears_values)
            else:
                self.hears_noise[node, self.num_concepts : node] = 1
                self.hears_values[node] = 1

    def forward(self, noise: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """The mechanisms' noise.

        Args:
            noise: (B, N, d), exogenous.
            mask: (B, K).
            values_of: the values (B, N, d_c) that come of mechanisms' noise (B, N, d) under a mask (B, K).
        """
        noise = at_least_single(noise)
        z = torch.zeros_like(noise)
        for place, node in enumerate(self.order.tolist()):
            shift, log_scale, spline = self._transform(self._heard(place, node, z, mask, values_of), node)
            z[:, node] = shift + log_scale.exp() * spline.inverse(noise[:, node])
        return z

    def inverse(self, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """The exogenous noise that the mechanisms' noise is made of; arguments as for `forward`."""
        z = at_least_single(z)
        return self.explain(z, self.heard(z, mask, values_of))[0]

    def heard(self, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """What each node depends on (B, N, in_dim), given all of the mechanisms' noise."""
        order = self.order.tolist()
        heard = {node: self._heard(place, node, z, mask, values_of) for place, node in enumerate(order)}
        return torch.stack([heard[node] for node in range(len(order))], dim=1)

    def explain(self, z: torch.Tensor, heard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exogenous noise (B, N, d), and each node's `log |de/dz|` (B, N), of the mechanisms' noise and what `heard`
        returns."""
        shift, log_scale, spline = self._transform(heard)
        noise, log_derivative = spline((z - shift) * (-log_scale).exp())
        return noise, (log_derivative - log_scale).sum(dim=-1)

    def _heard(self, place: int, node: int, z: torch.Tensor, mask: torch.Tensor, values_of: ValuesOf) -> torch.Tensor:
        """What the node at this place of the order depends on (B, in_dim); noise of later ones may be anything."""
        num_concepts = self.num_concepts
        earlier = torch.zeros_like(z)
        before = self.order[: min(place, num_concepts)]
        earlier[:, before] = z[:, before]
        values = values_of(earlier, mask)[:, :num_concepts].to(z) / self.value_scale.to(z)
        values = values * self.hears_values[node, :, None].to(z)
        free = torch.ones_like(z[:, :, 0])
        free[:, :num_concepts] = 1 - mask
        heard_noise = z * (self.hears_noise[node].to(z) * free)[..., None]
        own = mask[:, node : node + 1].to(z) if node < num_concepts else torch.zeros_like(z[:, :1, 0])
        heard = torch.cat([values.flatten(1), heard_noise.flatten(1)], dim=1) * (1 - own)
        return torch.cat([own, heard], dim=1)

    def _transform(
        self, heard: torch.Tensor, node: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, RationalQuadraticSpline]:
        """Shift and log-scale (B, N, d) and splines of all nodes, or (B, d) of one, given what they depend on."""
        x = heard if node is None else heard[:, None]
        for layer in (self.first, self.middle, self.last):
            weight, bias = at_least_single(layer.weight), at_least_single(layer.bias)
            if node is not None:
                weight, bias = weight[node : node + 1], bias[node : node + 1]
            x = torch.einsum("noi,bni->bno", weight, x if layer is self.first else F.silu(x)) + bias
        x = x.unflatten(-1, (self.dim, -1))
        shift, log_scale, widths, heights, slopes = x.split([1, 1, _BINS, _BINS, _BINS - 1], dim=-1)
        parts = [shift[..., 0], _LARGEST_LOG_SCALE * torch.tanh(log_scale[..., 0] / _LARGEST_LOG_SCALE)]
        parts += [widths, heights, slopes]
        shift, log_scale, widths, heights, slopes = parts if node is None else [part[:, 0] for part in parts]
        return shift, log_scale, RationalQuadraticSpline.of(widths, heights, slopes, _BOUND)


def _causal_order(strengths: torch.Tensor) -> list[int]:
    """Nodes such that as little as can be is caused by later ones: each time the one that those left cause least."""
    left, order = list(range(len(strengths))), []
    while left:
        least = min(left, key=lambda node: float(strengths[node, left].sum()))
        order.append(least)
        left.remove(least)
    return order
