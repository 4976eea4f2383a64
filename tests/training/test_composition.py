"""The composition loss against its formula, and the combinations that are drawn for it."""

import pytest
import torch

from diffusers_ctx import ContextModule
from diffusers_ctx.training.diffusion.composition import composition_losses, draw_combinations


NAMES = ("rain", "snow", "night")


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = ContextModule(NAMES, token_dim=8, num_hidden_factors=1, noise_dim=1, concept_dim=1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
        module.causal.blocks.copy_(0.5 * torch.randn_like(module.causal.blocks))
    return module


def predict(tokens):
    """Interventions act on one another: the prediction is no sum of what nodes do."""
    flat = tokens.flatten(1)
    return (flat.cumsum(1).sin() * flat)[:, :32].view(-1, 2, 4, 4)


def test_a_pair_is_to_change_a_prediction_by_the_sum_of_what_each_does(module):
    z = torch.randn(3, 4, 1)
    pairs = torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]])
    with torch.no_grad():
        losses = composition_losses(predict, module, z, pairs)
        for row, pair in enumerate(pairs):
            one = slice(row, row + 1)
            both = module.concept_values(z[one], pair[None])
            plain = module.concept_values(z[one], torch.zeros(1, 3))

            def at(nodes, both=both, plain=plain, pair=pair):
                """The prediction with these of the intervened nodes at their intervened values."""
                values = both.clone()
                for node in pair.nonzero().flatten().tolist():
                    if node not in nodes:
                        values[:, node] = plain[:, node]
                return predict(module.read_out(values))

            first, second = pair.nonzero().flatten().tolist()
            target = at([first]) + at([second]) - at([])
            expected = (at([first, second]) - target).square().mean()
            assert losses[row].item() == pytest.approx(expected.item(), rel=1e-4)
            assert losses[row] > 1e-3


def test_three_interventions_and_one(module):
    z = torch.randn(2, 4, 1)
    with torch.no_grad():
        three, one = composition_losses(predict, module, z, torch.tensor([[1.0, 1, 1], [0, 1, 0]]))
    assert one < 1e-10  # the sum of one change is that change
    assert three > 1e-3


def test_the_loss_is_zero_where_the_prediction_is_a_sum_over_nodes(module):
    z, combinations = torch.randn(5, 4, 1), torch.ones(5, 3)
    with torch.no_grad():
        losses = composition_losses(lambda tokens: tokens.sum(dim=(1, 2)).view(-1, 2, 2, 2), module, z, combinations)
    torch.testing.assert_close(losses, torch.zeros(5), atol=1e-8, rtol=0)


def test_the_sum_is_not_learned_from(module):
    z, pairs = torch.randn(3, 4, 1), torch.tensor([[1.0, 1, 0]]).repeat(3, 1)
    scale = torch.ones(1, requires_grad=True)
    with_gradients = []

    def record(tokens):
        prediction = predict(tokens) * scale
        with_gradients.append(prediction.requires_grad)
        return prediction

    composition_losses(record, module, z, pairs).sum().backward()
    assert with_gradients == [False, False, False, True]
    assert module.read_out.tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("number", [2, 3, 6])
def test_combinations_have_two_or_three_concepts_and_those_of_their_context(number):
    masks = torch.cat([torch.zeros(1, number), torch.eye(number)]).repeat(300, 1)
    drawn = draw_combinations(masks, torch.rand(len(masks), number + 1))
    assert ((drawn - masks) >= 0).all() and set(drawn.unique().tolist()) <= {0.0, 1.0}
    sizes = drawn.sum(dim=1)
    expected = [2.0] if number == 2 else [2.0, 3.0]
    assert sizes.unique().tolist() == expected
    of_plain = drawn[masks.sum(dim=1) == 0].mean(dim=0)
    assert (of_plain - of_plain.mean()).abs().max() < 0.12  # every concept as often
    if number > 2:
        assert 0.4 < (sizes == 2).float().mean() < 0.6
