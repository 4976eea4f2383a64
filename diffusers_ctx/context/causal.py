"""How concepts cause one another: the two forms of the causal layer.

Both are linear maps `c = M(m) e` of the stacked nodes. An intervened concept receives nothing from the others, also
under several interventions at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class ReducedForm(nn.Module):
    """The form of Markham et al. (arXiv 2507.04754):

        c_i = e_i + (1 - m_i) sum_{j != i} [(1 - m_j) B_ij^obs + m_j B_ij^do] e_j

    Args:
        num_concepts: concepts, which can be intervened on.
        num_hidden_factors: nodes that follow them.
        dim: width of a node.
    """

    allowed: torch.Tensor

    def __init__(self, num_concepts: int, num_hidden_factors: int, dim: int):
        super().__init__()
        num_nodes = num_concepts + num_hidden_factors
        self.blocks_obs = nn.Parameter(torch.zeros(num_nodes, num_nodes, dim, dim))
        self.blocks_do = nn.Parameter(torch.zeros(num_nodes, num_concepts, dim, dim))
        self.register_buffer("allowed", 1 - torch.eye(num_nodes), persistent=False)

    def matrix(self, mask: torch.Tensor) -> torch.Tensor:
        """`M(m)` of shape (B, N d, N d)."""
        num_concepts = mask.shape[1]
        strength = mask[:, None, :, None, None]
        concepts = self.blocks_obs[:, :num_concepts]
        blocks = torch.cat(
            [
                concepts + strength * (self.blocks_do - concepts),
                self.blocks_obs[:, num_concepts:].expand(len(mask), -1, -1, -1, -1),
            ],
            dim=2,
        )
        return _identity_plus(blocks * self.allowed[:, :, None, None] * _receives(mask, len(self.allowed)))

    def forward(self, e: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _apply(self.matrix(mask), e)

    def inverse_matrix(self, mask: torch.Tensor) -> torch.Tensor:
        """The matrix (B, N d, N d) that takes `c` back to `e`."""
        return torch.linalg.inv(upcast_half(self.matrix(mask)))

    def acyclicity(self) -> torch.Tensor:
        """Zero: a reduced form states total effects, among which cycles have no meaning."""
        return self.blocks_obs.new_zeros(())

    @torch.no_grad()
    def strengths(self) -> torch.Tensor:
        """Frobenius norms (N, N) of the blocks; row = effect, column = cause."""
        return self.blocks_obs.norm(dim=(2, 3)) * self.allowed

    def group_lasso(self) -> torch.Tensor:
        """Sum of the blocks' norms: pulls whole edges to zero."""
        return (_norms(self.blocks_obs) * self.allowed).sum()


class Structural(nn.Module):
    """A structural causal model, solved exactly for every set of interventions:

        c = e + (1 - m) * (A c)

    do(k) removes j's effect on i through k, which the reduced form keeps.

    Args:
        num_concepts: concepts, which can be intervened on.
        num_hidden_factors: nodes that follow them.
        dim: width of a node.
        edges: pairs (cause, effect) of node indices that may be non-zero; `None` allows all, and the penalty
            `acyclicity` leads training to a graph without cycles.
    """

    allowed: torch.Tensor

    def __init__(
        self,
        num_concepts: int,
        num_hidden_factors: int,
        dim: int,
        edges: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__()
        num_nodes = num_concepts + num_hidden_factors
        self.blocks = nn.Parameter(torch.zeros(num_nodes, num_nodes, dim, dim))
        if edges is None:
            allowed = 1 - torch.eye(num_nodes)
        else:
            allowed = torch.zeros(num_nodes, num_nodes)
            for cause, effect in edges:
                allowed[effect, cause] = 1
            if torch.linalg.matrix_power(allowed, num_nodes).any():
                raise ValueError("The given graph has a cycle; remove an edge of it.")
        self.register_buffer("allowed", allowed, persistent=False)

    def inverse_matrix(self, mask: torch.Tensor) -> torch.Tensor:
        """`I - (1 - m) A`, the matrix (B, N d, N d) that takes `c` back to `e`."""
        return _identity_plus(-self.blocks * self.allowed[:, :, None, None] * _receives(mask, len(self.allowed)))

    def forward(self, e: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        solved = torch.linalg.solve(upcast_half(self.inverse_matrix(mask)), upcast_half(e.flatten(1)))
        return solved.view_as(e).to(e.dtype)

    def acyclicity(self) -> torch.Tensor:
        """DAGMA's log-determinant penalty on the squared block norms: zero exactly for acyclic graphs.

        Bello et al. 2022 (arXiv 2209.08037), Definition 1, with s = 1 scaled up where the blocks leave its domain.
        """
        squares = self.blocks.float().square().sum(dim=(2, 3)) * self.allowed
        # a row sum below s keeps sI - W an M-matrix, the domain on which the penalty is defined
        s = squares.detach().sum(dim=1).max().clamp(min=1.0) * 1.01
        identity = torch.eye(len(squares), device=squares.device)
        return len(squares) * s.log() - torch.linalg.slogdet(s * identity - squares).logabsdet

    @torch.no_grad()
    def strengths(self) -> torch.Tensor:
        """Frobenius norms (N, N) of the blocks; row = effect, column = cause."""
        return self.blocks.norm(dim=(2, 3)) * self.allowed

    def group_lasso(self) -> torch.Tensor:
        """Sum of the blocks' norms: pulls whole edges to zero."""
        return (_norms(self.blocks) * self.allowed).sum()


def upcast_half(x: torch.Tensor) -> torch.Tensor:
    """`x` in single precision where it has less: linear systems cannot be solved in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norms(blocks: torch.Tensor) -> torch.Tensor:
    """Frobenius norms (N, M), smoothed at zero, where the norm has no gradient and blocks start."""
    return (blocks.square().sum(dim=(2, 3)) + 1e-8).sqrt()


def _receives(mask: torch.Tensor, num_nodes: int) -> torch.Tensor:
    """`1 - m` of the receiving node, with hidden factors always receiving: (B, N, 1, 1, 1)."""
    receives = mask.new_ones(len(mask), num_nodes)
    receives[:, : mask.shape[1]] = 1 - mask
    return receives[:, :, None, None, None]


def _identity_plus(blocks: torch.Tensor) -> torch.Tensor:
    """(B, N, N, d, d) blocks to an (B, N d, N d) matrix with the identity added."""
    batch, nodes, _, dim, _ = blocks.shape
    matrix = blocks.transpose(2, 3).reshape(batch, nodes * dim, nodes * dim)
    return matrix + torch.eye(nodes * dim, device=blocks.device, dtype=blocks.dtype)


def _apply(matrix: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    return (matrix @ nodes.flatten(1)[..., None])[..., 0].view_as(nodes)
