"""The invertible map: its volume, its loss recomputed, and a world in which a plain network folds."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import make_context_module
from scipy.stats import norm

from diffusers_ctx import ContextModule
from diffusers_ctx.training.concepts.flow import NormalizingFlow
from diffusers_ctx.training.concepts.losses import prior_matching_loss, sorted_distance, unit_directions
from diffusers_ctx.training.concepts.search import (
    Candidate,
    CodeBatch,
    ImageCodes,
    Population,
    _draw_batch,
    _draw_rows,
    _initial_candidates,
    clip_each_gradient,
    search_flow,
)
from diffusers_ctx.training.config import ContextConfig
from diffusers_ctx.training.run.keyed_noise import KeyedNoise


CONTEXTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_volume_is_that_of_the_jacobian(dim):
    torch.manual_seed(0)
    flow = NormalizingFlow(dim, num_layers=3, width=8)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(4, dim)
    _, log_volume = flow(x)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0][0], x[row])
        torch.testing.assert_close(log_volume[row], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-4, rtol=1e-4)


def test_it_starts_as_a_rotation():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    y, log_volume = NormalizingFlow(4)(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(log_volume, torch.zeros(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_it_can_start_as_any_linear_map(dim):
    torch.manual_seed(0)
    flow, weight, bias, x = NormalizingFlow(dim), torch.randn(dim, dim), torch.randn(dim), torch.randn(6, dim)
    flow.start_at(weight, bias)
    y, log_volume = flow(x)
    torch.testing.assert_close(y, x @ weight.T + bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_volume, torch.linalg.slogdet(weight).logabsdet.expand(6), atol=1e-4, rtol=1e-4)


def test_noise_goes_back_to_what_values_came_from():
    module = make_context_module()
    z = torch.randn(4, *module.noise_shape)
    values = torch.cat([module.concept_values(z[[row]], CONTEXTS[[row]]) for row in range(4)])
    noise, log_volumes = module.noise_of(values, CONTEXTS)
    torch.testing.assert_close(noise[torch.arange(4), torch.arange(4)], z, atol=1e-3, rtol=1e-3)

    def from_values(flat: torch.Tensor) -> torch.Tensor:
        return module.noise_of(flat.view(1, *module.noise_shape), CONTEXTS[1:2])[0].flatten()

    jacobian = torch.autograd.functional.jacobian(from_values, values[0].flatten())
    torch.testing.assert_close(log_volumes[1], torch.linalg.slogdet(jacobian).logabsdet, atol=1e-3, rtol=1e-3)


def order_statistics_by_hand(count: int) -> np.ndarray:
    """Expected ones of draws from N(0, 1), by Blom's approximation."""
    return norm.ppf((np.arange(1, count + 1) - 3 / 8) / (count + 1 / 4))


def test_order_statistics_are_means_of_sorted_draws():
    draws = np.random.default_rng(0).standard_normal((50_000, 32))
    assert order_statistics_by_hand(32) == pytest.approx(np.sort(draws, axis=1).mean(axis=0), abs=0.015)


def test_the_loss_is_its_terms():
    torch.manual_seed(0)
    module = make_context_module()
    flow = NormalizingFlow(math.prod(module.noise_shape))
    options = ContextConfig(contrastive_weight=2.0, matching_weight=3.0, acyclicity_weight=4.0, sparsity_weight=0.5)
    labels = torch.arange(4).repeat_interleave(2)
    codes, directions = torch.randn(8, math.prod(module.noise_shape)), torch.randn(math.prod(module.noise_shape), 3)
    with torch.no_grad():
        loss, score = Candidate(flow, module)(CodeBatch(codes, directions, labels, CONTEXTS), options)
        flat, log_volume = flow(codes)
        values = flat.unflatten(1, module.noise_shape)
        densities = module.log_prob(values, CONTEXTS).double().numpy()
        own = densities[np.arange(8), labels]
        contrast = np.mean(np.log(np.exp(densities).sum(axis=1)) - own)
        noise = torch.stack(
            [module.noise_of(values[[row]], CONTEXTS)[0][0, label] for row, label in enumerate(labels)]
        )
        swd = prior_matching_loss(noise, directions, 4).item()
        causal = module.causal
        expected = (
            2.0 * contrast
            + 3.0 * swd
            - 0.05 * (own + log_volume.numpy()).mean()
            + 4.0 * causal.acyclicity().item()
            + 0.5 * causal.strengths().sum().item()
        )
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert score.item() == pytest.approx((own + log_volume.numpy()).mean() - 2.0 * contrast, rel=1e-4)


def test_the_prior_is_matched_within_contexts_and_over_all():
    rng = np.random.default_rng(1)
    noise, directions = 1.5 * rng.standard_normal((64, 3)), rng.standard_normal((3, 5))
    directions /= np.linalg.norm(directions, axis=0)
    projections = noise @ directions
    within = np.sort(projections.reshape(2, 32, 5), axis=1) - order_statistics_by_hand(32)[:, None]
    pooled = np.sort(projections, axis=0) - order_statistics_by_hand(64)[:, None]
    loss = prior_matching_loss(torch.from_numpy(noise)[..., None], torch.from_numpy(directions), groups=2)
    assert loss.item() == pytest.approx(np.mean(within**2) + np.mean(pooled**2), rel=1e-5)


def test_gradients_of_the_match_are_those_of_comparing_with_random_samples():
    torch.manual_seed(0)
    noise = (2 * torch.randn(6, 1, 1) + 1).requires_grad_(True)
    direction = torch.ones(1, 1)
    prior_matching_loss(noise, direction, groups=1).backward()
    analytic, noise.grad = noise.grad, None
    for _ in range(4000):
        (2 / 4000 * sorted_distance(noise, torch.randn(6, 1, 1), direction, 1)).backward()
    torch.testing.assert_close(analytic, noise.grad, atol=0.03, rtol=0.03)


def test_distances_sort_within_groups():
    a, b = torch.tensor([[3.0], [1], [10], [20]]), torch.tensor([[1.0], [2], [20], [12]])
    direction = torch.ones(1, 1)
    assert sorted_distance(a, b, direction, groups=2).item() == (0 + 1 + 4 + 0) / 4
    assert sorted_distance(a, b, direction, groups=1).item() == (0 + 1 + 4 + 0) / 4
    swapped = b[[2, 3, 0, 1]]
    assert sorted_distance(a, swapped, direction, 1) < sorted_distance(a, swapped, direction, 2)
    norms = unit_directions(KeyedNoise(0, 0), 5, 7).norm(dim=0)
    torch.testing.assert_close(norms, torch.ones(7))


def test_rows_are_of_their_contexts():
    rows_of = [torch.tensor([5, 7]), torch.tensor([0]), torch.tensor([2, 3, 9])]
    rows = _draw_rows(rows_of, KeyedNoise(0, 0)).view(3, -1)
    for drawn, allowed in zip(rows, rows_of):
        assert set(drawn.tolist()) == set(allowed.tolist())


def test_an_intervention_that_narrows_is_not_folded():
    """do(night) moves nothing and narrows it; |night| is at hand in the code as much as night itself."""
    generator = torch.Generator().manual_seed(0)
    n, codes, truth = 2000, [], []
    for context in range(3):
        noise = torch.randn(n, 2, generator=generator)
        night = 0.3 * noise[:, 0] if context == 1 else noise[:, 0]
        snow = 1.5 + 0.5 * noise[:, 1] if context == 2 else 0.8 * night + noise[:, 1]
        truth.append(torch.stack([night, snow], dim=1))
        codes.append(torch.stack([snow, night, 2 * night.abs()], dim=1))
    mean, labels = torch.cat(codes), torch.arange(3).repeat_interleave(n)
    contexts = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    torch.manual_seed(0)
    module = ContextModule(["night", "snow"], token_dim=8, num_hidden_factors=1, noise_dim=1, concept_dim=1)
    image_codes = ImageCodes(mean, torch.full_like(mean, 0.1), labels)
    values = search_flow(module, image_codes, contexts, ContextConfig(concept_steps=300), seed=1, show_progress=False)
    assert values.shape == (3 * n, 3, 1)
    night, snow = torch.cat(truth).T.numpy()
    read = values[..., 0].numpy()
    assert abs(np.corrcoef(read[:, 0], night)[0, 1]) > 0.9 > abs(np.corrcoef(read[:, 0], np.abs(night))[0, 1])
    assert abs(np.corrcoef(read[:, 1], snow)[0, 1]) > 0.9


def small_search() -> tuple[ContextModule, ImageCodes, torch.Tensor]:
    torch.manual_seed(3)
    module = ContextModule(["night"], token_dim=8, num_hidden_factors=1, noise_dim=1, concept_dim=1)
    mean = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    return module, ImageCodes(mean, torch.ones(20, 2), torch.arange(20) % 2), torch.tensor([[0.0], [1.0]])


def small_candidates(count: int) -> list[Candidate]:
    module, _, _ = small_search()
    return [Candidate(NormalizingFlow(2), deepcopy(module)) for _ in range(count)]


def small_batches(count: int) -> list[CodeBatch]:
    _, codes, contexts = small_search()
    rows_of = [torch.nonzero(codes.labels == label)[:, 0] for label in range(2)]
    return [_draw_batch(codes, rows_of, contexts, KeyedNoise(0, step)) for step in range(count)]


def test_candidates_learn_together_as_they_do_alone():
    options, batches = ContextConfig(), small_batches(5)
    alone = [Population([candidate], options, steps=5) for candidate in small_candidates(3)]
    together = Population(small_candidates(3), options, steps=5)
    for batch in batches:
        for population in (*alone, together):
            population.step(batch)
    unlearned = Population(small_candidates(3), options, steps=5)
    for name, weight in together.weights.items():
        expected = torch.cat([population.weights[name] for population in alone])
        torch.testing.assert_close(weight, expected, atol=2e-5, rtol=1e-3)
        assert not torch.equal(weight, unlearned.weights[name])
    scores = torch.cat([population.scores() for population in alone])
    torch.testing.assert_close(together.scores(), scores, atol=1e-4, rtol=1e-4)


def test_candidates_that_are_kept_go_on_with_their_moments():
    options, batches = ContextConfig(), small_batches(6)
    kept, alone = Population(small_candidates(3), options, steps=6), Population(small_candidates(3)[2:], options, 6)
    for step, batch in enumerate(batches):
        if step == 3:
            kept.keep(torch.tensor([2]))
        kept.step(batch)
        alone.step(batch)
    assert len(kept) == 1
    for name, weight in kept.weights.items():
        torch.testing.assert_close(weight, alone.weights[name], atol=2e-5, rtol=1e-3)


def test_the_best_are_kept_by_the_mean_of_their_last_scores():
    population = Population(small_candidates(4), ContextConfig(), steps=3)
    each = [Population([candidate], ContextConfig(), steps=3) for candidate in small_candidates(4)]
    for batch in small_batches(3):
        population.step(batch)
        for one in each:
            one.step(batch)
    scores = [one.scores().item() for one in each]
    before = {name: weight.detach().clone() for name, weight in population.weights.items()}
    population.keep_best(2)
    best = sorted(range(4), key=lambda row: -scores[row])[:2]
    assert all(torch.equal(weight, before[name][best]) for name, weight in population.weights.items())
    assert population.scores().tolist() == pytest.approx([scores[row] for row in best], rel=1e-4)


def test_gradients_are_clipped_for_each_candidate():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.zeros(3, 2, 4, requires_grad=True), torch.zeros(3, 5, requires_grad=True)]
    scale = torch.tensor([0.01, 1.0, 100.0])
    gradients = [scale.view(3, *[1] * (w.ndim - 1)) * torch.randn(w.shape, generator=generator) for w in weights]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.clone()
    clip_each_gradient(weights, max_norm=2.0)
    for row in range(3):
        alone = [torch.zeros_like(w[row]).requires_grad_(True) for w in weights]
        for parameter, gradient in zip(alone, gradients):
            parameter.grad = gradient[row].clone()
        torch.nn.utils.clip_grad_norm_(alone, 2.0)
        for weight, parameter in zip(weights, alone):
            torch.testing.assert_close(weight.grad[row], parameter.grad)


def test_candidates_that_are_not_finite_drop_out():
    candidates, batches = small_candidates(3), small_batches(2)
    with torch.no_grad():
        candidates[1].flow.layers[0].bias.fill_(torch.inf)
    population = Population(candidates, ContextConfig(), steps=2)
    others = Population([small_candidates(3)[row] for row in (0, 2)], ContextConfig(), steps=2)
    for batch in batches:
        population.step(batch)
        others.step(batch)
    assert len(population) == 2
    for name, weight in population.weights.items():
        torch.testing.assert_close(weight, others.weights[name], atol=2e-5, rtol=1e-3)


def test_a_population_without_a_finite_candidate_fails():
    candidates = small_candidates(2)
    with torch.no_grad():
        for candidate in candidates:
            candidate.flow.layers[0].bias.fill_(torch.inf)
    population = Population(candidates, ContextConfig(), steps=1)
    with pytest.raises(FloatingPointError, match="contrastive_weight"):
        population.step(small_batches(1)[0])


def test_the_best_candidate_of_a_search_is_returned():
    """One by one, in a loop of its own."""
    module, codes, contexts = small_search()
    options, seed = ContextConfig(concept_steps=10), 0
    steps, asked = 20, []
    values = search_flow(module, codes, contexts, options, seed, False, before_step=lambda: asked.append(1))
    assert len(asked) == steps
    original, _, _ = small_search()
    candidates = _initial_candidates(original, codes, contexts, seed)
    populations = [Population([candidate], options, steps) for candidate in candidates]
    rows_of = [torch.nonzero(codes.labels == label)[:, 0] for label in range(2)]
    for first, last, survivors in ((0, 2, 3), (2, 6, 1), (6, 20, 1)):
        for population in populations:
            for step in range(first, last):
                population.step(_draw_batch(codes, rows_of, contexts, KeyedNoise(seed, "search", step)))
        populations = sorted(populations, key=lambda one: one.scores().item(), reverse=True)[:survivors]
        for population in populations:
            population.fit_scms(codes, contexts, seed)
    best = populations[0].candidate(0)
    torch.testing.assert_close(values, best.values(codes), atol=1e-3, rtol=1e-2)
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, best.context_module.state_dict()[name], atol=1e-2, rtol=1e-2)


def test_a_search_can_be_stopped_before_each_step():
    module, codes, contexts = small_search()
    before, asked = deepcopy(module.state_dict()), []

    def stop_at_the_fourth() -> None:
        asked.append(1)
        if len(asked) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_flow(module, codes, contexts, ContextConfig(concept_steps=10), 0, False, stop_at_the_fourth)
    assert len(asked) == 4
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_mechanisms_are_those_that_fit_the_values():
    """In each context, the noise that values come from has the moments of its prior."""
    torch.manual_seed(3)
    module = ContextModule(["night"], token_dim=8, num_hidden_factors=1, noise_dim=1, concept_dim=1)
    labels = torch.arange(400) % 2
    mean = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * (1 + labels)[:, None]
    codes, contexts = ImageCodes(mean, torch.full((400, 2), 0.1), labels), torch.tensor([[0.0], [1.0]])
    options = ContextConfig(concept_steps=150)
    values = search_flow(module, codes, contexts, options, seed=0, show_progress=False)
    noise = torch.cat([module.noise_of(values[labels == row], contexts[[row]])[0][:, 0] for row in range(2)])
    for row in range(2):
        night = noise.view(2, -1, 2)[row, :, 0]
        torch.testing.assert_close(night.mean(), torch.zeros(()), atol=0.01, rtol=0)
        torch.testing.assert_close(night.std(), torch.ones(()), atol=0.01, rtol=0)


def test_it_depends_on_the_seed_and_on_nothing_else():
    def learned(seed: int) -> torch.Tensor:
        torch.manual_seed(3)
        module = ContextModule(["night"], token_dim=8, num_hidden_factors=0, noise_dim=2, concept_dim=2)
        torch.randn(seed)  # has no influence
        mean = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
        codes = ImageCodes(mean, torch.ones(20, 2), torch.arange(20) % 2)
        options = ContextConfig(concept_steps=3)
        return search_flow(module, codes, torch.tensor([[0.0], [1.0]]), options, seed, show_progress=False)

    assert torch.equal(learned(1), learned(1)) and not torch.equal(learned(1), learned(2))
