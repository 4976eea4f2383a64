"""The fit of the causal layer to known values: its likelihood recomputed, and worlds whose graph is known."""

import math

import pytest
import torch

from diffusers_ctx import ContextModule
from diffusers_ctx.training.concepts.scm_fit import LinearGaussianSCM, Moments, fit_scm
from diffusers_ctx.training.config import ContextConfig


CONTEXTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


def _module(**options) -> ContextModule:
    options = {"num_hidden_factors": 1, "noise_dim": 1, "concept_dim": 1} | options
    torch.manual_seed(0)
    return ContextModule(["night", "snow", "rain"], token_dim=8, **options)


def _world(module: ContextModule, n: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of a world with night -> snow -> rain, a hidden cause of snow, and interventions of every kind."""
    with torch.no_grad():
        module.causal.blocks[1, 0] = 1.2
        module.causal.blocks[2, 1] = -0.9
        module.causal.blocks[1, 3] = 0.6
        module.mechanism.weight_obs.copy_(torch.tensor([1.0, 0.7, 0.8, 1.0])[:, None, None])
        module.mechanism.bias_obs.copy_(torch.tensor([0.2, -0.4, 0.0, 0.0])[:, None])
        module.mechanism.weight_do.copy_(torch.tensor([0.3, 0.8, 1.1])[:, None, None])
        module.mechanism.bias_do.copy_(torch.tensor([0.0, 1.5, -2.0])[:, None])
        labels = torch.arange(4).repeat_interleave(n)
        noise = torch.randn(4 * n, *module.noise_shape, generator=torch.Generator().manual_seed(0))
        return module.concept_values(noise, CONTEXTS[labels]), labels


@pytest.mark.parametrize("options", [{}, {"noise_dim": 3, "concept_dim": 3}, {"causal_form": "reduced_form"}])
def test_the_likelihood_is_that_of_the_module(options):
    module = _module(**options)
    with torch.no_grad():
        for parameter in [*module.mechanism.parameters(), *module.causal.parameters()]:
            parameter += 0.2 * torch.randn(parameter.shape)
        values, labels = torch.randn(60, *module.noise_shape), torch.arange(4).repeat_interleave(15)
        own = module.log_prob(values, CONTEXTS)[torch.arange(60), labels]
        unlikelihood = LinearGaussianSCM(module)(Moments.of(values, labels), CONTEXTS).item()
    constant = values[0].numel() / 2 * math.log(2 * math.pi)
    assert unlikelihood == pytest.approx(-own.mean().item() - constant, rel=1e-4)


def test_contexts_weigh_the_same_whatever_their_number_of_images():
    module = _module()
    values, labels = _world(module, n=50)
    kept = torch.cat([torch.nonzero(labels < 3)[:, 0], torch.nonzero(labels == 3)[:, 0].repeat(4)])
    few, many = Moments.of(values, labels), Moments.of(values[kept], labels[kept])
    with torch.no_grad():
        expected = LinearGaussianSCM(module)(few, CONTEXTS).item()
        assert LinearGaussianSCM(module)(many, CONTEXTS).item() == pytest.approx(expected, rel=1e-5)


def test_an_edge_that_settled_the_wrong_way_is_turned_round():
    true = _module()
    values, labels = _world(true)
    module = _module()
    with torch.no_grad():
        module.causal.blocks[0, 1] = 0.7  # snow -> night
        module.causal.blocks[2, 0] = -0.8  # night -> rain, past snow
    fit_scm(module, values, labels, CONTEXTS, ContextConfig(), seed=0)
    learned = module.causal.strengths()[:3, :3]
    expected = torch.tensor([[0.0, 0, 0], [1.2, 0, 0], [0, 0.9, 0]])
    torch.testing.assert_close(learned, expected, atol=0.1, rtol=0)
    torch.testing.assert_close(module.mechanism.bias_do, true.mechanism.bias_do, atol=0.1, rtol=0)
    scale = module.mechanism.weight_do.abs()
    torch.testing.assert_close(scale, true.mechanism.weight_do, atol=0.1, rtol=0)


def test_a_given_graph_is_kept():
    module = _module(graph=[("rain", "snow")])
    values, labels = _world(_module())
    fit_scm(module, values, labels, CONTEXTS, ContextConfig(), seed=0)
    learned = module.causal.strengths()[:3, :3]
    assert learned[1, 2] > 0.1
    assert (learned > 0).sum() == 1
    assert torch.equal(module.causal.blocks[..., 0, 0] != 0, module.causal.allowed.bool())


@pytest.mark.parametrize("options", [{}, {"noise_dim": 3, "concept_dim": 3}, {"causal_form": "reduced_form"}])
def test_it_is_the_same_with_the_same_seed(options):
    torch.manual_seed(1)
    labels = torch.arange(4).repeat_interleave(50)
    values = torch.randn(200, *_module(**options).noise_shape) + labels[:, None, None]
    fitted = [_module(**options) for _ in range(2)]
    for module in fitted:
        fit_scm(module, values, labels, CONTEXTS, ContextConfig(concept_steps=60), seed=3)
    first, second = (module.state_dict() for module in fitted)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    unfitted = _module(**options).state_dict()
    assert not torch.equal(first["mechanism.bias_do"], unfitted["mechanism.bias_do"])


def test_fewer_images_than_dimensions_keep_distributions_of_some_width():
    module = _module(noise_dim=2, concept_dim=2)
    values, labels = torch.randn(8, *module.noise_shape), torch.arange(4).repeat_interleave(2)
    fit_scm(module, values, labels, CONTEXTS, ContextConfig(), seed=0)
    noise, _ = module.noise_of(values, CONTEXTS)
    own = noise[torch.arange(8), labels]
    assert own.isfinite().all() and own.abs().max() < 10
    assert torch.linalg.svdvals(module.mechanism.weight_obs).min() > 0.01


def test_values_that_are_not_finite_leave_the_module_as_it_is():
    module = _module()
    values, labels = _world(_module(), n=10)
    fit_scm(module, values.log(), labels, CONTEXTS, ContextConfig(concept_steps=6), seed=0)
    unfitted = _module().state_dict()
    assert all(torch.equal(weight, unfitted[name]) for name, weight in module.state_dict().items())
