"""Splines against the formula with numbers of their own, and what makes a flow of them."""

import math

import pytest
import torch

from diffusers_ctx.context.splines import RationalQuadraticSpline


BOUND = 3.0


@pytest.fixture
def spline():
    torch.manual_seed(0)
    return RationalQuadraticSpline.of(torch.randn(50, 6), torch.randn(50, 6), torch.randn(50, 5), BOUND)


def test_zeros_are_the_identity():
    spline = RationalQuadraticSpline.of(torch.zeros(9, 6), torch.zeros(9, 6), torch.zeros(9, 5), BOUND)
    x = torch.linspace(-4, 4, 9)
    y, log_derivative = spline(x)
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(log_derivative, torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(spline.inverse(x), x)


def test_a_bin_is_equation_4(spline):
    row, number, t = 7, 2, 0.3
    (x0, x1), (y0, y1), (d0, d1) = (
        [float(knot) for knot in knots[row, number : number + 2]] for knots in (spline.x, spline.y, spline.slopes)
    )
    slope = (y1 - y0) / (x1 - x0)
    expected = y0 + (y1 - y0) * (slope * t * t + d0 * t * (1 - t)) / (slope + (d1 + d0 - 2 * slope) * t * (1 - t))
    x = torch.zeros(50)
    x[row] = x0 + t * (x1 - x0)
    assert float(spline(x)[0][row]) == pytest.approx(expected, abs=1e-5)


def test_the_derivative_is_that_of_the_values_and_positive(spline):
    x = torch.linspace(-2.99, 2.99, 50, requires_grad=True)
    y, log_derivative = spline(x)
    (derivative,) = torch.autograd.grad(y.sum(), x)
    assert derivative.min() > 0
    torch.testing.assert_close(log_derivative.exp(), derivative, rtol=1e-3, atol=1e-4)


def test_it_can_be_undone_within_the_bound_and_outside(spline):
    x = torch.linspace(-5, 5, 50)
    y, log_derivative = spline(x)
    torch.testing.assert_close(spline.inverse(y), x, atol=1e-4, rtol=0)
    outside = x.abs() > BOUND
    assert torch.equal(y[outside], x[outside]) and not log_derivative[outside].any()
    assert math.isclose(float(spline.y[:, -1].max()), BOUND, abs_tol=1e-5)
