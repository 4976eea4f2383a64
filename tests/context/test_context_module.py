"""The context module against the paper's equations (arXiv 2507.04754), recomputed number by number."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusers_ctx import ContextModule
from diffusers_ctx.context import intervention_mask


CONCEPTS = ["a", "b", "c"]
MASKS = [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0.3, 0, 0.8]]


def make_module(**options) -> ContextModule:
    torch.manual_seed(0)
    module = ContextModule(CONCEPTS, token_dim=6, readout_width=5, posterior_width=8, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    # away from singular, so that the recomputation's tolerance says something
    for weight in (module.mechanism.weight_obs, module.mechanism.weight_do):
        weight.data += torch.eye(weight.shape[-1])
    return module.double()


def noise_for(module: ContextModule, rows: int) -> torch.Tensor:
    return torch.randn(rows, *module.noise_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def numbers(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}


def silu(x: float) -> float:
    return x / (1 + np.exp(-x))


def nodewise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = np.zeros(len(bias))
    for o in range(len(bias)):
        out[o] = bias[o]
        for i in range(len(x)):
            out[o] += weight[o, i] * x[i]
    return out


def mechanisms_by_hand(w: dict, z: np.ndarray, m: list[float]) -> np.ndarray:
    """Step 2: u_k = (1 - m_k)(A_k^obs z_k + a_k^obs) + m_k (A_k^do z_k + a_k^do)."""
    u = np.zeros_like(z)
    for k in range(len(z)):
        observed = nodewise(z[k], w["mechanism.weight_obs"][k], w["mechanism.bias_obs"][k])
        if k < len(CONCEPTS):
            intervened = nodewise(z[k], w["mechanism.weight_do"][k], w["mechanism.bias_do"][k])
            u[k] = (1 - m[k]) * observed + m[k] * intervened
        else:
            u[k] = observed
    return u


def expressive_by_hand(w: dict, u: np.ndarray, depth: int) -> np.ndarray:
    """Step 3: one MLP per node, SiLU between its layers."""
    rows = []
    for k in range(len(u)):
        x = u[k]
        for layer in range(depth):
            x = nodewise(x, w[f"expressive.{2 * layer}.weight"][k], w[f"expressive.{2 * layer}.bias"][k])
            if layer < depth - 1:
                x = np.array([silu(value) for value in x])
        rows.append(x)
    return np.array(rows)


def received(m: list[float], i: int) -> float:
    return 1 - m[i] if i < len(CONCEPTS) else 1.0


def reduced_form_by_hand(w: dict, e: np.ndarray, m: list[float]) -> np.ndarray:
    """Step 4: c_i = e_i + (1 - m_i) sum_{j != i} [(1 - m_j) B_ij^obs + m_j B_ij^do] e_j."""
    c = e.copy()
    for i in range(len(e)):
        for j in range(len(e)):
            if i == j:
                continue
            for row in range(e.shape[1]):
                for column in range(e.shape[1]):
                    block = w["causal.blocks_obs"][i, j, row, column]
                    if j < len(CONCEPTS):
                        block = (1 - m[j]) * block + m[j] * w["causal.blocks_do"][i, j, row, column]
                    c[i, row] += received(m, i) * block * e[j, column]
    return c


def structural_by_hand(w: dict, e: np.ndarray, m: list[float], order: list[int], allowed: np.ndarray) -> np.ndarray:
    """Step 4: c = e + (1 - m) * (A c), solved cause before effect."""
    c = np.zeros_like(e)
    for i in order:
        c[i] = e[i]
        for j in range(len(e)):
            for row in range(e.shape[1]):
                for column in range(e.shape[1]):
                    c[i, row] += received(m, i) * allowed[i, j] * w["causal.blocks"][i, j, row, column] * c[j, column]
    return c


def tokens_by_hand(w: dict, c: np.ndarray, num_tokens: int) -> np.ndarray:
    """Step 5: an MLP per node, then a layer norm of each token."""
    rows = []
    for k in range(len(c)):
        hidden = nodewise(c[k], w["read_out.hidden.weight"][k], w["read_out.hidden.bias"][k])
        hidden = np.array([silu(value) for value in hidden])
        tokens = nodewise(hidden, w["read_out.tokens.weight"][k], w["read_out.tokens.bias"][k])
        normed = []
        for token in tokens.reshape(num_tokens, -1):
            token = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
            normed.append(token * w["read_out.norm.weight"] + w["read_out.norm.bias"])
        rows.append(normed)
    return np.array(rows)


def check_forward(module: ContextModule, values_by_hand) -> None:
    w = numbers(module)
    z = noise_for(module, len(MASKS))
    mask = torch.tensor(MASKS, dtype=torch.float64)
    values, tokens = module.concept_values(z, mask), module(z, mask)
    for row, m in enumerate(MASKS):
        expected = values_by_hand(w, z[row].numpy(), m)
        np.testing.assert_allclose(values[row].detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        expected_tokens = tokens_by_hand(w, expected, module.config.tokens_per_concept)
        np.testing.assert_allclose(tokens[row].detach().numpy(), expected_tokens, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hidden", [0, 2])
def test_reduced_form_follows_the_paper(hidden):
    module = make_module(
        causal_form="reduced_form",
        posterior_type="amortized",
        num_hidden_factors=hidden,
        noise_dim=2,
        concept_dim=3,
        expressive_depth=3,
        tokens_per_concept=2,
    )

    def by_hand(w, z, m):
        return reduced_form_by_hand(w, expressive_by_hand(w, mechanisms_by_hand(w, z, m), depth=3), m)

    check_forward(module, by_hand)


def test_structural_form_with_a_given_graph():
    graph = [("a", "b"), ("b", "c"), ("hidden_0", "a"), ("hidden_0", "c")]
    module = make_module(graph=graph, num_hidden_factors=1, noise_dim=2, concept_dim=2)
    allowed = np.zeros((4, 4))
    for cause, effect in [(0, 1), (1, 2), (3, 0), (3, 2)]:
        allowed[effect, cause] = 1

    def by_hand(w, z, m):
        return structural_by_hand(w, mechanisms_by_hand(w, z, m), m, order=[3, 0, 1, 2], allowed=allowed)

    check_forward(module, by_hand)


def test_structural_form_with_a_learned_graph_solves_its_equations():
    module = make_module(num_hidden_factors=1, noise_dim=2, concept_dim=2)
    module.causal.blocks.data *= 0.3
    w, z, mask = numbers(module), noise_for(module, len(MASKS)), torch.tensor(MASKS, dtype=torch.float64)
    values = module.concept_values(z, mask).detach().numpy()
    allowed = 1 - np.eye(4)
    for row, m in enumerate(MASKS):
        e, c = mechanisms_by_hand(w, z[row].numpy(), m), values[row]
        for i in range(4):
            right = e[i].copy()
            for j in range(4):
                right += received(m, i) * allowed[i, j] * w["causal.blocks"][i, j] @ c[j]
            np.testing.assert_allclose(c[i], right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["structural", "reduced_form"])
@pytest.mark.parametrize("mask", [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])
def test_an_intervened_concept_receives_nothing(form, mask):
    module = make_module(causal_form=form)
    z = noise_for(module, 1).requires_grad_(True)
    value_of_a = module.concept_values(z, torch.tensor([mask], dtype=torch.float64))[0, 0]
    (gradient,) = torch.autograd.grad(value_of_a.sum(), z)
    assert gradient[0, 0].abs().min() > 0
    assert torch.count_nonzero(gradient[0, 1:]) == 0


def test_an_observed_concept_receives_from_all():
    module = make_module()
    z = noise_for(module, 1).requires_grad_(True)
    value_of_a = module.concept_values(z, torch.tensor([[0.0, 1, 0]], dtype=torch.float64))[0, 0]
    (gradient,) = torch.autograd.grad(value_of_a.sum(), z)
    assert (gradient[0].abs().sum(dim=-1) > 0).all()


def test_in_a_chain_an_intervention_in_the_middle_cuts_the_ends_apart():
    module = make_module(graph=[("a", "b"), ("b", "c")], num_hidden_factors=0)
    z = noise_for(module, 1).requires_grad_(True)

    def effect_of_a_on_c(mask):
        value = module.concept_values(z, torch.tensor([mask], dtype=torch.float64))[0, 2]
        return torch.autograd.grad(value.sum(), z)[0][0, 0].abs().sum()

    assert effect_of_a_on_c([0, 0, 0]) > 0
    assert effect_of_a_on_c([1, 0, 0]) > 0
    assert effect_of_a_on_c([0, 1, 0]) == 0
    assert effect_of_a_on_c([1, 1, 0]) == 0


@pytest.mark.parametrize("form", ["structural", "reduced_form"])
def test_rows_of_a_batch_are_independent_of_one_another(form):
    module = make_module(causal_form=form)
    z, mask = noise_for(module, len(MASKS)), torch.tensor(MASKS, dtype=torch.float64)
    together = module(z, mask)
    for row in range(len(MASKS)):
        torch.testing.assert_close(together[row], module(z[row : row + 1], mask[row : row + 1])[0])


def test_strengths_interpolate_and_zero_is_observational():
    module = make_module()
    z = noise_for(module, 1)

    def u(strength):
        mask = intervention_mask({"b": strength}, CONCEPTS, 1).double()
        return module.mechanism(z, mask)[0, 1]

    torch.testing.assert_close(u(0.25), 0.75 * u(0.0) + 0.25 * u(1.0), rtol=1e-6, atol=1e-7)
    observational = module(z, intervention_mask(None, CONCEPTS, 1))
    assert torch.equal(module(z, intervention_mask({"a": 0.0, "b": 0.0}, CONCEPTS, 1)), observational)
    module.causal.blocks.data *= 0.2  # away from cycles that amplify
    steps = [module.concept_values(z, intervention_mask({"b": s}, CONCEPTS, 1)) for s in torch.linspace(0, 1, 21)]
    distances = [(later - earlier).norm() for earlier, later in pairwise(steps)]
    assert max(distances) < 0.2 * (steps[-1] - steps[0]).norm() + 1e-9


@pytest.mark.parametrize("form", ["structural", "reduced_form"])
def test_the_inverse_posterior_inverts_the_mechanisms(form):
    """Its mean takes values back to their noise, its covariance is that of the transformed values."""
    module = make_module(causal_form=form, num_hidden_factors=1, noise_dim=2, concept_dim=2)
    module.causal.load_state_dict({name: 0.5 * weight for name, weight in module.causal.state_dict().items()})
    z, mask = noise_for(module, len(MASKS)), torch.tensor(MASKS, dtype=torch.float64)
    values = module.concept_values(z, mask)
    log_variance = torch.linspace(-3, 0, 8, dtype=torch.float64).view(1, 4, 2).expand_as(values)
    posterior = module.noise_posterior(values, log_variance, mask)
    torch.testing.assert_close(posterior.mean, z, rtol=1e-6, atol=1e-6)
    for row in range(len(MASKS)):
        jacobian = torch.autograd.functional.jacobian(
            lambda flat, row=row: module.concept_values(flat.view(1, 4, 2), mask[row : row + 1]).flatten(),
            z[row].flatten(),
        )
        inverse = torch.linalg.inv(jacobian)
        expected = inverse @ torch.diag(log_variance[row].flatten().exp()) @ inverse.T
        torch.testing.assert_close(posterior.factor[row] @ posterior.factor[row].T, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("posterior_type", ["inverse", "amortized"])
def test_kl_divergence_and_draws(posterior_type):
    module = make_module(posterior_type=posterior_type)
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    posterior = module.posterior(latents, torch.tensor(MASKS[:3]))
    size = posterior.mean[0].numel()
    for row in range(3):
        covariance = posterior.factor[row] @ posterior.factor[row].T
        law = torch.distributions.MultivariateNormal(posterior.mean[row].flatten(), covariance)
        prior = torch.distributions.MultivariateNormal(torch.zeros(size).double(), torch.eye(size).double())
        expected = torch.distributions.kl_divergence(law, prior)
        torch.testing.assert_close(posterior.kl()[row].sum(), expected, rtol=1e-5, atol=1e-6)
    count = 20_000
    eps = torch.randn(count, *module.noise_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    many = type(posterior)(*(part[:1].expand(count, *part.shape[1:]) for part in vars(posterior).values()))
    draws = many.at(eps).flatten(1)
    covariance = posterior.factor[0] @ posterior.factor[0].T
    variance = covariance.diagonal()
    # five standard errors: of a mean, and of a Gaussian's sample covariance
    mean_error = (draws.mean(dim=0) - posterior.mean[0].flatten()).abs()
    assert (mean_error < 5 * (variance / count).sqrt()).all()
    covariance_error = (draws.T.cov() - covariance).abs()
    assert (covariance_error < 5 * ((variance[:, None] * variance + covariance.square()) / count).sqrt()).all()


def test_the_posterior_is_told_the_context():
    for posterior_type in ("inverse", "amortized"):
        module = make_module(posterior_type=posterior_type)
        latents = torch.ones(2, 4, 8, 8, dtype=torch.float64)
        mean = module.posterior(latents, torch.tensor([[0, 0, 0], [1, 0, 0]])).mean
        assert (mean[0, 0] - mean[1, 0]).abs().max() > 1e-3


def test_acyclicity_is_zero_for_acyclic_graphs_alone():
    module = make_module(num_hidden_factors=0)
    module.causal.blocks.data.zero_()
    assert module.causal.acyclicity().item() == pytest.approx(0, abs=1e-6)
    module.causal.blocks.data[1, 0] = 2.0
    module.causal.blocks.data[2, 1] = 2.0
    assert module.causal.acyclicity().item() == pytest.approx(0, abs=1e-5)
    module.causal.blocks.data[0, 2] = 0.5
    assert module.causal.acyclicity().item() > 1e-3


def test_strengths_are_the_norms_of_effect_and_cause():
    module = make_module(num_hidden_factors=0)
    module.causal.blocks.data.zero_()
    module.causal.blocks.data[1, 0, 0, 0], module.causal.blocks.data[1, 0, 1, 1] = 3.0, 4.0
    strengths = module.causal.strengths()
    assert strengths[1, 0] == 5 and strengths.sum() == 5


@pytest.mark.parametrize("form", ["structural", "reduced_form"])
def test_saving_and_loading_changes_nothing(tmp_path, form):
    graph = [("a", "b")] if form == "structural" else None
    module = make_module(causal_form=form, graph=graph).float()
    module.save_pretrained(str(tmp_path))
    loaded = ContextModule.from_pretrained(str(tmp_path))
    assert dict(loaded.config)["concepts"] == CONCEPTS
    z, mask = noise_for(module, 2).float(), torch.tensor([[0, 1, 0], [1, 0, 0]])
    assert torch.equal(module(z, mask), loaded(z, mask))
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(module.posterior(latents, mask).mean, loaded.posterior(latents, mask).mean)


def test_half_precision_runs():
    module = make_module().to(torch.bfloat16)
    z = noise_for(module, 2).to(torch.bfloat16)
    mask = torch.tensor([[0, 0, 0], [0, 1, 0]])
    assert module(z, mask).dtype == torch.bfloat16
    mean = module.posterior(torch.ones(2, 4, 8, 8, dtype=torch.bfloat16), mask).mean
    assert mean.dtype == torch.float32 and mean.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": []}, "name at least one"),
        ({"concepts": ["a", "a"]}, "names one twice"),
        ({"concepts": ["a", "obs"]}, "observational context"),
        ({"graph": [("a", "nowhere")]}, "nowhere"),
        ({"graph": [("a", "b"), ("b", "a")]}, "cycle"),
        ({"graph": [("a", "b")], "causal_form": "reduced_form"}, "structural"),
        ({"causal_form": "cyclic"}, "structural"),
        ({"posterior_type": "oracle"}, "amortized"),
        ({"expressive_depth": 2}, "amortized"),
        ({"expressive_depth": 0, "concept_dim": 7}, "must agree"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContextModule(**{"concepts": CONCEPTS, "token_dim": 6, **options})


@pytest.mark.parametrize("form", ["structural", "reduced_form"])
def test_density_of_values_in_every_context(form):
    """Against the Gaussian that the values have by the forward map: its mean and covariance, column by column."""
    module = make_module(causal_form=form, num_hidden_factors=1, noise_dim=2, concept_dim=2)
    module.causal.load_state_dict({name: 0.5 * weight for name, weight in module.causal.state_dict().items()})
    masks = torch.tensor(MASKS, dtype=torch.float64)
    values = torch.randn(7, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    log_prob = module.log_prob(values, masks)
    for context, mask in enumerate(masks):
        mean = module.concept_values(torch.zeros(1, 4, 2).double(), mask[None]).flatten()
        units = torch.eye(8, dtype=torch.float64).view(8, 4, 2)
        columns = module.concept_values(units, mask.expand(8, -1)).flatten(1) - mean
        law = torch.distributions.MultivariateNormal(mean, columns.T @ columns)
        torch.testing.assert_close(log_prob[:, context], law.log_prob(values.flatten(1)), rtol=1e-6, atol=1e-6)


def test_contexts_differ_in_the_density_of_the_intervened_concept_alone():
    """What the contrast between two contexts can see: the intervened node, given its causes."""
    module = make_module(graph=[("a", "b"), ("b", "c")], num_hidden_factors=0)
    masks = torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    values = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    observational, intervened = module.log_prob(values, masks)[0]
    (gradient,) = torch.autograd.grad(intervened - observational, values)
    assert (gradient[0, :2].abs().sum(dim=-1) > 1e-3).all()
    assert gradient[0, 2].abs().max() < 1e-9


def test_density_needs_an_inverse():
    module = make_module(posterior_type="amortized", expressive_depth=1)
    with pytest.raises(ValueError, match="expressive_depth=0"):
        module.log_prob(torch.zeros(1, 5, 4).double(), torch.zeros(1, 3).double())


def test_features_are_standardised_before_the_posterior_sees_them(context_module):
    assert not any("mean" in name or "std" in name for name in context_module.encoder.state_dict())  # latents are not
    options = {"posterior_in_channels": 3, "posterior_feature_size": 8, "posterior_encoder": "unet"}
    module = ContextModule(CONCEPTS, token_dim=32, posterior_sample_size=64, **options)
    features = torch.randn(20, 3, 8, 8) * torch.tensor([1e3, 1e-2, 0.0])[:, None, None] + 100
    module.encoder.fit(features)
    standardized = module.encoder.layers[0](features)
    assert standardized.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    deviations = standardized.std(dim=(0, 2, 3))
    assert deviations[0] == pytest.approx(1, abs=1e-3) and deviations[1] < 1 and deviations[2] == 0
    mask = torch.zeros(20, len(CONCEPTS))
    expected = module.posterior(features, mask).mean
    other = ContextModule(CONCEPTS, token_dim=32, posterior_sample_size=64, **options)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.posterior(features, mask).mean, expected) and expected.isfinite().all()


def test_concepts_called_like_hidden_factors_keep_their_names():
    module = ContextModule(["hidden_0", "night"], token_dim=8, num_hidden_factors=2, graph=[("hidden_0", "night")])
    assert module.node_names == ["hidden_0", "night", "hidden__0", "hidden__1"]
    assert ContextModule(["night"], token_dim=8, num_hidden_factors=1).node_names == ["night", "hidden_0"]
