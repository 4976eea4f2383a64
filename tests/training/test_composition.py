"""The composition loss against its formula, and the combinations that are drawn for it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from diffusers_ctx import ContextModule
from diffusers_ctx.training import parse_training_config
from diffusers_ctx.training.checks import check_accelerator
from diffusers_ctx.training.diffusion.composition import composition_losses, draw_combinations

from .conftest import _reset_accelerate, create_stage, encoded_trainer, flags


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


def test_combinations_are_learned_after_the_singles(options):
    """From 0.3 of the steps on, by about a quarter of the images."""
    learned = []

    def train(weight: float) -> list[float]:
        _reset_accelerate()
        trainer = encoded_trainer(options | {"composition_weight": weight, "max_train_steps": 10})
        trainer.context_module.mechanism.bias_do.data += 1  # interventions that change something
        stage = create_stage(trainer)
        inputs = stage._inputs
        stage._inputs = lambda *args: learned.append(inputs(*args)) or learned[-1]
        return [metrics["loss"] for metrics in stage.steps()]

    without = train(0.0)
    assert all(draws.combinations is None for _, draws, _ in learned)
    learned.clear()
    losses = train(1.0)
    combinations = [draws.combinations for _, draws, _ in learned]
    assert [drawn is None for drawn in combinations] == [True] * 3 + [False] * 7
    sizes = torch.cat(combinations[3:]).sum(dim=1)
    assert set(sizes.tolist()) == {0.0, 2.0} and 2 <= (sizes > 0).sum() <= 14  # of 28
    assert losses[:3] == without[:3] and losses[3:] != without[3:]


def test_fsdp_is_refused_with_it(options):
    config = parse_training_config(flags(options | {"composition_weight": 1.0}))
    plugin = SimpleNamespace(fsdp_version=2, auto_wrap_policy=None, activation_checkpointing=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=DistributedType.FSDP, mixed_precision="no"
    )
    with pytest.raises(ValueError, match="set `composition_weight` to 0"):
        check_accelerator(accelerator, config)
