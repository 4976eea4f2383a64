"""The flow between exogenous noise and that of the mechanisms: it can be undone, and interventions cut it."""

import pytest
import torch
from conftest import CONCEPTS, make_context_module

from diffusers_ctx import ContextModule


CHAIN = [("night", "snow"), ("snow", "fog")]  # night before snow before fog


def make_module(dim: int = 1, graph=CHAIN, hidden_first: bool = True, **options) -> ContextModule:
    """With random weights, in the order of its graph; hidden factors cause all concepts, or none."""
    sizes = {"noise_dim": dim, "concept_dim": dim}
    module = make_context_module(graph=graph, causal_flow=True, **sizes, **options).requires_grad_(False)
    if not hidden_first:
        module.causal.blocks[:, 3:] = 0
    module.causal.keep_edges(module.flow.follow(module.causal.strengths(), least=0.0))
    return module


def draw(module: ContextModule, n: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Exogenous noise, and masks of all kinds."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(3, (n, len(CONCEPTS)), generator=generator) / 2
    return torch.randn(n, *module.noise_shape, generator=generator), masks


def test_a_reduced_form_has_no_order_to_follow():
    with pytest.raises(ValueError, match="no order of causes"):
        make_context_module(causal_form="reduced_form", causal_flow=True)


def test_it_starts_as_the_identity():
    module = ContextModule(CONCEPTS, token_dim=8, causal_flow=True)
    noise, masks = draw(module)
    torch.testing.assert_close(module.mechanism_noise(noise, masks), noise)
    torch.testing.assert_close(module.exogenous_noise(noise, masks), noise)


def test_what_follows_it_is_drawn_as_without_it():
    drawn = []
    for causal_flow in (False, True):
        torch.manual_seed(0)
        module = ContextModule(CONCEPTS, token_dim=8, causal_flow=causal_flow)
        drawn.append((module.read_out.state_dict(), torch.rand(3)))
    (plain, then), (flowing, after) = drawn
    assert all(torch.equal(plain[name], flowing[name]) for name in plain) and torch.equal(then, after)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_first": False},
        {"dim": 4},
        {"num_hidden_factors": 0},
    ],
)
def test_it_can_be_undone_under_every_mask(options):
    module = make_module(**options).double()
    noise, masks = (x.double() for x in draw(module))
    z = module.mechanism_noise(noise, masks)
    assert (z - noise).abs().mean() > 0.05
    torch.testing.assert_close(module.exogenous_noise(z, masks), noise, atol=1e-8, rtol=0)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_volume_is_that_of_the_jacobian(dim):
    module = make_module(dim)
    noise, masks = draw(module, n=5)
    z = module.mechanism_noise(noise, masks)
    flow, values_of = module.flow, module.concept_values
    _, log_derivatives = flow.explain(z, flow.heard(z, masks, values_of), masks)
    for row in range(5):
        mask = masks[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda x, m=mask: flow.inverse(x, m, values_of), z[row : row + 1]
        )
        size = z[row].numel()
        expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        torch.testing.assert_close(log_derivatives[row].sum(), expected, atol=1e-3, rtol=1e-3)


def moved_by(module: ContextModule, changed: str, mask: list[float]) -> set[str]:
    """Nodes whose noise is another one when that of a node changes."""
    noise, _ = draw(module)
    masks = torch.tensor([mask]).expand(len(noise), -1)
    other = noise.clone()
    other[:, module.node_names.index(changed)] += 1
    before, after = module.mechanism_noise(noise, masks), module.mechanism_noise(other, masks)
    gaps = (after - before).abs().amax(dim=(0, 2))
    return {name for name, gap in zip(module.node_names, gaps) if gap > 1e-6}


HIDDEN = {"hidden_0", "hidden_1"}


def test_later_nodes_hear_of_earlier_ones():
    module = make_module()
    assert moved_by(module, "hidden_0", [0.0, 0, 0]) == {*CONCEPTS} | HIDDEN
    assert moved_by(module, "hidden_1", [0.0, 0, 0]) == {*CONCEPTS, "hidden_1"}
    assert moved_by(module, "night", [0.0, 0, 0]) == {"night", "snow", "fog"}
    assert moved_by(module, "fog", [0.0, 0, 0]) == {"fog"}


def test_hidden_factors_that_cause_nothing_follow_the_concepts():
    module = make_module(hidden_first=False)
    assert moved_by(module, "fog", [0.0, 0, 0]) == {"fog"} | HIDDEN
    assert moved_by(module, "fog", [0.0, 0, 1]) == {"fog"} | HIDDEN  # its value, whichever mechanism made it
    assert moved_by(module, "hidden_0", [0.0, 0, 0]) == HIDDEN
    assert moved_by(module, "hidden_1", [0.0, 0, 0]) == {"hidden_1"}


def test_a_concept_that_is_intervened_on_hears_of_no_other():
    module = make_module()
    assert moved_by(module, "night", [0.0, 1, 0]) == {"night", "fog"}  # which hears of its noise
    assert moved_by(module, "hidden_1", [1.0, 1, 1]) == {"hidden_1"}
    assert "fog" in moved_by(module, "snow", [0.0, 1, 0])  # by its value, of which it is the effect


def test_the_noise_of_a_concept_that_is_intervened_on_tells_nothing_of_others():
    module = make_module()
    module.flow.hears_values.zero_()
    assert moved_by(module, "night", [0.0, 0, 0]) == {"night", "snow", "fog"}
    assert moved_by(module, "night", [1.0, 0, 0]) == {"night"}


@pytest.mark.parametrize("hidden_first", [True, False])
@pytest.mark.parametrize("intervened", ["night", "snow", "fog"])
def test_an_intervention_moves_nothing_but_what_it_causes(intervened, hidden_first):
    module = make_module(hidden_first=hidden_first)
    noise, _ = draw(module)
    masks = torch.zeros(len(noise), 3)
    before = module.concept_values(module.mechanism_noise(noise, masks), masks)
    masks[:, CONCEPTS.index(intervened)] = 1
    after = module.concept_values(module.mechanism_noise(noise, masks), masks)
    moved = {name for name, gap in zip(module.node_names, (after - before).abs().amax(dim=(0, 2))) if gap > 1e-6}
    chain = ["night", "snow", "fog"]
    assert moved == {*chain[chain.index(intervened) :]} | (set() if hidden_first else HIDDEN)


def test_a_hidden_factor_between_concepts_hears_of_those_before_it():
    module = make_module(graph=None)
    strengths = torch.zeros(5, 5)
    strengths[3, 0] = strengths[1, 3] = 1.0  # night causes hidden_0, which causes snow
    strengths[0, 1] = 0.1  # against that order
    forward = module.flow.follow(strengths, least=0.5)
    assert module.flow.order.tolist() == [2, 0, 3, 1, 4]
    assert forward[3, 0] and forward[1, 3] and not forward[0, 1] and not forward[:, 4].any() and forward[4, :4].all()
    module.causal.keep_edges(forward)
    assert moved_by(module, "night", [0.0, 0, 0]) == {"night", "hidden_0", "snow", "hidden_1"}
    assert moved_by(module, "fog", [0.0, 0, 1]) == {"fog", "hidden_0", "hidden_1", "snow"}


def test_half_an_intervention_is_between():
    module = make_module()
    noise, _ = draw(module)
    none, half, full = (module.mechanism_noise(noise, torch.full((len(noise), 3), x)) for x in (0.0, 0.5, 1.0))
    root = CONCEPTS.index("night")
    gaps = [(z - none)[:, root].abs().mean() for z in (half, full)]
    assert 0 < gaps[0] < gaps[1]


def test_the_order_is_that_of_causes():
    order = make_module(graph=[("fog", "snow"), ("snow", "night")]).flow.order.tolist()
    assert [CONCEPTS[node] for node in order[2:]] == ["fog", "snow", "night"] and order[:2] == [3, 4]


def test_it_is_saved_with_the_module(tmp_path):
    module = make_module()
    module.save_pretrained(tmp_path)
    loaded = ContextModule.from_pretrained(tmp_path)
    noise, masks = draw(module)
    assert torch.equal(loaded.mechanism_noise(noise, masks), module.mechanism_noise(noise, masks))


def test_noise_of_another_precision_is_taken():
    module = make_module()
    noise, masks = draw(module)
    with torch.autocast("cpu", torch.bfloat16):
        z = module.mechanism_noise(noise.double(), masks)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, module.mechanism_noise(noise, masks))


def test_half_precision():
    module = make_module().to(torch.float16)
    noise, masks = draw(module)
    z = module.mechanism_noise(noise, masks)
    assert z.dtype == torch.float32 and z.isfinite().all()
    torch.testing.assert_close(z, make_module().mechanism_noise(noise, masks), atol=0.05, rtol=0.05)
    assert module(z, masks).dtype == torch.float16
