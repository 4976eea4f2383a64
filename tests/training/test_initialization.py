"""Directions in which contexts differ: a world whose directions are known, and the map that is made of them."""

import pytest
import torch

from diffusers_ctx.training.concepts.initialization import initial_directions


MIXED = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0] * torch.tensor(
    [1.0, 2, 0.5, 3, 1]
)
CONTEXTS = torch.tensor([[0.0, 1], [0, 0], [1, 0], [1, 1]])


def draw(n=4000):
    """Codes of factors that are mixed; the first one is moved, the third one narrowed, by the two interventions."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(4 * n) % 4
    factors = torch.randn(4 * n, 5, generator=generator)
    first, second = CONTEXTS[labels].T
    factors[:, 0] = torch.where(first == 1, 1.5 + 0.7 * factors[:, 0], factors[:, 0])
    factors[:, 2] *= torch.where(second == 1, 0.2, 1.0)
    return factors, factors @ MIXED.T, labels


def correlations(a, b):
    return torch.corrcoef(torch.stack([a, b]))[0, 1].abs().item()


@pytest.mark.parametrize("dim", [1, 2])
def test_each_concept_has_the_direction_in_which_its_contexts_differ(dim):
    factors, codes, labels = draw()
    noise = 0.01 * torch.ones_like(codes)
    weight, bias = initial_directions(codes, noise.square(), labels, CONTEXTS, dim)
    values = codes @ weight.T + bias
    observational = labels == 1
    assert correlations(values[observational, 0], factors[observational, 0]) > 0.98
    assert correlations(values[observational, dim], factors[observational, 2]) > 0.98
    # white in the observational context, whatever the codes' scales
    torch.testing.assert_close(values[observational].mean(dim=0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(values[observational].T), torch.eye(5), atol=5e-3, rtol=0)


def test_what_is_not_known_of_codes_counts_as_their_spread():
    """A dimension that the encoder leaves to its prior has means of no width, which must not be blown up."""
    _, codes, labels = draw()
    collapsed = torch.cat([codes, 1e-4 * torch.randn(len(codes), 1, generator=torch.Generator().manual_seed(2))], 1)
    variance = torch.zeros_like(collapsed)
    variance[:, -1] = 1
    weight, _ = initial_directions(collapsed, variance, labels, CONTEXTS, 1)
    assert weight[:, -1].norm().item() == pytest.approx(1, abs=1e-3)


def test_two_concepts_of_one_direction_share_it():
    _, codes, labels = draw()
    same = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    kept = labels > 0
    codes, labels = codes[kept], torch.tensor([0, 0, 1, 2])[labels[kept]]
    codes[labels == 2] = codes[labels == 1][: (labels == 2).sum()]  # the same images in both contexts
    weight, _ = initial_directions(codes, torch.zeros_like(codes), labels, same, 1)
    assert torch.linalg.cond(weight).item() < 20


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_few_images_of_each_context_or_the_same_ones_will_do(n):
    labels = torch.arange(len(CONTEXTS)).repeat_interleave(n)
    for codes in (torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(3)), torch.ones(len(labels), 5)):
        weight, bias = initial_directions(codes, torch.full_like(codes, 0.1), labels, CONTEXTS, 1)
        assert weight.isfinite().all() and bias.isfinite().all() and torch.linalg.matrix_rank(weight) == 5
