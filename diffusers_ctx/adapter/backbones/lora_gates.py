"""Gates of the adapter's LoRA: context tokens weigh its components.

A LoRA adds `B A x` to a layer. With gates it adds `B diag(g) A x`, where `g = 1 + V s` and `s` is a projection of the
context tokens: what the layer does is a sum of what each node does to it, as of LoRAs that are added up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


_STATE = 4  # numbers that a node's tokens are projected to


class LoraGates(nn.Module):
    """The gates of all layers, which learn along with the LoRA.

    Args:
        tokens_shape: (N, T, token_dim).
        num_layers: layers with a LoRA.
        rank: components of each.
    """

    def __init__(self, tokens_shape: Sequence[int], num_layers: int, rank: int):
        super().__init__()
        num_nodes, num_tokens, token_dim = tokens_shape
        width = num_tokens * token_dim
        self.shape = (num_layers, rank)
        self.project = nn.Parameter(torch.randn(num_nodes, _STATE, width) / width**0.5)
        self.weigh = nn.Linear(num_nodes * _STATE, num_layers * rank, bias=False)
        nn.init.normal_(self.weigh.weight, std=(num_nodes * _STATE) ** -0.5)
        self._open: torch.Tensor | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gates (B, L, r) of tokens (B, N, T, token_dim), which the layers have until the next call."""
        state = torch.einsum("bnd,nsd->bns", tokens.flatten(2).to(self.project), self.project)
        self._open = 1 + self.weigh(state.flatten(1)).unflatten(-1, self.shape)
        return self._open

    def install(self, layers: Sequence[nn.Module]) -> None:
        """Lets the gates weigh what these layers, the `A` of each LoRA, put out."""
        for index, layer in enumerate(layers):
            layer.register_forward_hook(functools.partial(_weigh, self, index))

    def of_layer(self, index: int) -> torch.Tensor:
        """Gates (B, r) of a layer in the call that is running."""
        assert self._open is not None
        return self._open[:, index]


def _weigh(gates: LoraGates, index: int, layer: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    # a function of the module and no closure: copies of the model have copies of the gates
    gate = gates.of_layer(index).to(output)
    return output * gate.view(len(gate), *[1] * (output.ndim - 2), -1)
