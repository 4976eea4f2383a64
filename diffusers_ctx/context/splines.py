"""Monotone rational-quadratic splines (Durkan et al. 2019, arXiv 1906.04032), elementwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


_LEAST = 1e-3  # share of a bin's width and height, and slope, at least
_ONE = 0.5397424  # softplus(_ONE) = 1 - _LEAST, so that zeros stand for slopes of one


@dataclass(frozen=True)
class RationalQuadraticSpline:
    """An increasing function on [-b, b] with itself as its range, and the identity outside.

    Attributes:
        x: (..., n + 1), where bins begin and end.
        y: (..., n + 1), the values there.
        slopes: (..., n + 1), the derivatives there.
    """

    x: torch.Tensor
    y: torch.Tensor
    slopes: torch.Tensor

    @classmethod
    def of(
        cls, widths: torch.Tensor, heights: torch.Tensor, slopes: torch.Tensor, bound: float
    ) -> RationalQuadraticSpline:
        """From what a network says: widths and heights (..., n) and inner slopes (..., n - 1) without constraints; the
        identity where all are zero."""
        inner = _LEAST + F.softplus(slopes + _ONE)
        return cls(_knots(widths, bound), _knots(heights, bound), F.pad(inner, (1, 1), value=1.0))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (...) and the logarithms of the derivatives (...), equations 4 and 5."""
        inside, (x0, width, y0, height, d0, d1) = self._bins(x, self.x)
        slope = height / width
        t = ((x - x0) / width).clamp(0, 1)
        rest = t * (1 - t)
        denominator = slope + (d0 + d1 - 2 * slope) * rest
        y = y0 + height * (slope * t**2 + d0 * rest) / denominator
        numerator = slope**2 * (d1 * t**2 + 2 * slope * rest + d0 * (1 - t) ** 2)
        log_derivative = numerator.log() - 2 * denominator.log()
        return torch.where(inside, y, x), torch.where(inside, log_derivative, torch.zeros_like(y))

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """What values (...) are of, equations 6 to 8."""
        inside, (x0, width, y0, height, d0, d1) = self._bins(y, self.y)
        slope = height / width
        above = (y - y0).clamp(min=0)
        common = above * (d0 + d1 - 2 * slope)
        a, b, c = height * (slope - d0) + common, height * d0 - common, -slope * above
        root = 2 * c / (-b - (b**2 - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside, x0 + root * width, y)

    def _bins(self, at: torch.Tensor, knots: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Whether each of `at` (...) is within the bound; `x`, width, `y`, height and both slopes of its bin."""
        last = knots.shape[-1] - 2
        place = (torch.searchsorted(knots.contiguous(), at[..., None].contiguous()) - 1).clamp(0, last)
        begins = [numbers.gather(-1, place)[..., 0] for numbers in (self.x, self.y, self.slopes)]
        ends = [numbers.gather(-1, place + 1)[..., 0] for numbers in (self.x, self.y, self.slopes)]
        (x0, y0, d0), (x1, y1, d1) = begins, ends
        return (at > knots[..., 0]) & (at < knots[..., -1]), [x0, x1 - x0, y0, y1 - y0, d0, d1]


def _knots(sizes: torch.Tensor, bound: float) -> torch.Tensor:
    shares = _LEAST + (1 - _LEAST * sizes.shape[-1]) * sizes.softmax(dim=-1)
    return F.pad(2 * bound * shares.cumsum(dim=-1), (1, 0)) - bound
