"""The layers that act on each node alone: the mechanism, the expressive layers and the read-out to tokens.

Nodes are the concepts, followed by the hidden factors. Every weight carries the nodes as its first dimension, so that
the noise of one concept cannot reach another one here, in any context.
"""

from __future__ import annotations

import math

import torch
from torch import nn


class NodewiseLinear(nn.Module):
    """A linear layer of its own for every node: (B, N, in_dim) to (B, N, out_dim)."""

    def __init__(self, num_nodes: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(num_nodes, out_dim, in_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_nodes, out_dim).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("noi,bni->bno", self.weight, x) + self.bias


class MechanismLayer(nn.Module):
    """The mechanisms: interventions act on the exogenous noise.

        u_k = (1 - m_k) (A_k^obs z_k + a_k^obs) + m_k (A_k^do z_k + a_k^do)

    Hidden factors have no intervened regime: their mask is zero.

    Args:
        num_concepts: concepts, which can be intervened on.
        num_hidden_factors: nodes that follow them and that no context intervenes on.
        dim: width of a node's noise.
    """

    def __init__(self, num_concepts: int, num_hidden_factors: int, dim: int):
        super().__init__()
        num_nodes = num_concepts + num_hidden_factors
        # both regimes start as the identity, so that it is the data that tells them apart
        self.weight_obs = nn.Parameter(torch.eye(dim).repeat(num_nodes, 1, 1))
        self.bias_obs = nn.Parameter(torch.zeros(num_nodes, dim))
        self.weight_do = nn.Parameter(torch.eye(dim).repeat(num_concepts, 1, 1))
        self.bias_do = nn.Parameter(torch.zeros(num_concepts, dim))

    def coefficients(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (B, N, d, d) and bias (B, N, d) of the mixture of the two regimes; `mask` is (B, K)."""
        strength = mask[:, :, None]
        num_concepts = mask.shape[1]
        bias = self.bias_obs[:num_concepts] + strength * (self.bias_do - self.bias_obs[:num_concepts])
        weight = self.weight_obs[:num_concepts] + strength[..., None] * (
            self.weight_do - self.weight_obs[:num_concepts]
        )
        hidden_bias = self.bias_obs[num_concepts:].expand(len(mask), -1, -1)
        hidden_weight = self.weight_obs[num_concepts:].expand(len(mask), -1, -1, -1)
        return torch.cat([weight, hidden_weight], dim=1), torch.cat([bias, hidden_bias], dim=1)

    def forward(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight, bias = self.coefficients(mask)
        return (weight @ z[..., None])[..., 0] + bias


class ExpressiveLayers(nn.Sequential):
    """One MLP per node, shared by all contexts; widths go evenly from `in_dim` to `out_dim`.

    Depth 0 is the identity, for modules whose posterior inverts the mechanisms. There is no normalization over the
    batch: adapters are trained with small batches on many processes.
    """

    def __init__(self, num_nodes: int, in_dim: int, out_dim: int, depth: int):
        if depth == 0 and in_dim != out_dim:
            raise ValueError(
                f"Without expressive layers, noise_dim ({in_dim}) and concept_dim ({out_dim}) must agree."
            )
        widths = [round(in_dim + (out_dim - in_dim) * step / max(depth, 1)) for step in range(depth + 1)]
        layers: list[nn.Module] = []
        for step in range(depth):
            layers.append(NodewiseLinear(num_nodes, widths[step], widths[step + 1]))
            if step < depth - 1:
                layers.append(nn.SiLU())
        super().__init__(*layers)


class ReadOut(nn.Module):
    """Tokens of the backbone's width for every node: (B, N, d_c) to (B, N, T, token_dim).

    A node's tokens are a function of that node alone, and the same function in every context.
    """

    def __init__(self, num_nodes: int, concept_dim: int, width: int, num_tokens: int, token_dim: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.hidden = NodewiseLinear(num_nodes, concept_dim, width)
        self.act = nn.SiLU()
        self.tokens = NodewiseLinear(num_nodes, width, num_tokens * token_dim)
        self.norm = nn.LayerNorm(token_dim)

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens(self.act(self.hidden(c)))
        return self.norm(tokens.unflatten(-1, (self.num_tokens, -1)))
