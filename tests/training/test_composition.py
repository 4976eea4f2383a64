"""The composition loss against its formula, and the combinations that are drawn for it."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from diffusers_ctx import ContextModule
from diffusers_ctx.adapter import backbone_of
from diffusers_ctx.pipelines import select_rows
from diffusers_ctx.training import parse_training_config
from diffusers_ctx.training.checks import check_accelerator
from diffusers_ctx.training.diffusion.composition import added_prediction, draw_combinations
from diffusers_ctx.training.run.keyed_noise import KeyedNoise

from .conftest import _reset_accelerate, create_stage, create_trainer, encoded_trainer, flags


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
        sums = added_prediction(predict, module, z, pairs)
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
            torch.testing.assert_close(sums[one], target, rtol=1e-4, atol=1e-5)
            assert (at([first, second]) - target).square().mean() > 1e-3


def test_three_interventions_and_one(module):
    z, combinations = torch.randn(2, 4, 1), torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    with torch.no_grad():
        sums, together = added_prediction(predict, module, z, combinations), predict(module(z, combinations))
    three, one = (sums - together).square().mean(dim=(1, 2, 3))
    assert one < 1e-10  # the sum of one change is that change
    assert three > 1e-3


def test_a_prediction_that_is_a_sum_over_nodes_is_its_own_sum(module):
    z, combinations = torch.randn(5, 4, 1), torch.ones(5, 3)

    def add(tokens):
        return tokens.sum(dim=(1, 2)).view(-1, 2, 2, 2)

    with torch.no_grad():
        sums = added_prediction(add, module, z, combinations)
        torch.testing.assert_close(sums, add(module(z, combinations)), atol=1e-4, rtol=1e-4)


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


def composing_stage(options, weight=1.0, **changes):
    _reset_accelerate()
    trainer = encoded_trainer(options | {"composition_weight": weight, "max_train_steps": 10, **changes})
    trainer.context_module.mechanism.bias_do.data += 1  # interventions that change something
    for layer in backbone_of(trainer.pipeline.unet).attention_layers.values():
        torch.nn.init.normal_(layer["value"].weight, std=3.0, generator=torch.Generator().manual_seed(0))
    return create_stage(trainer)


def learned_by(stage):
    """What each step of a stage learns, as it takes them."""
    learned, inputs = [], stage._inputs
    stage._inputs = lambda *args: learned.append(inputs(*args)) or learned[-1]
    losses = [metrics["loss"] for metrics in stage.steps()]
    return losses, [composed for *_, composed in learned]


def test_combinations_are_learned_after_the_singles(options):
    """From 0.6 of the steps on, in place of about a quarter of the images."""
    without, composed = learned_by(composing_stage(options, weight=0.0))
    assert composed == [None] * 10
    stage = composing_stage(options)
    losses, composed = learned_by(stage)
    assert composed[:6] == [None] * 6
    samples = [entry for entry in composed[6:] if entry is not None]
    assert 1 <= sum(len(entry.rows) for entry in samples) <= 10  # of 16 images
    assert all((entry.batch.mask.sum(dim=1) == 2).all() for entry in samples)
    assert losses[:6] == without[:6] and losses[6:] != without[6:]


def test_samples_are_drawn_by_the_sum_and_belong_to_the_images_of_their_captions(options):
    """Against DDIM by its formula, with predictions added up by hand."""
    stage = composing_stage(options)
    stage.step = 6
    stage._draw_composed()
    batches = stage.batches.batches(6)
    drawn = stage._composed._drawn
    assert sum(len(batch.captions) for batch, _ in drawn) >= 16
    for sample, _ in drawn:
        assert sample.captions == next(batches)[0].captions
    sample, z = drawn[0]
    pipeline, module = stage.pipeline, stage.pipeline.context_module
    random = KeyedNoise(0, "composed samples", 0)
    random.uniform(len(z), 3), random.normal(*z.shape)
    x = random.normal(*sample.latents.shape)
    text, _ = pipeline.encode_prompt(sample.captions, "cpu", 1, do_classifier_free_guidance=False)
    alphas = pipeline.scheduler.alphas_cumprod
    timesteps = torch.linspace(999, 0, 13).round().long()

    def predict(interventions, t):
        tokens = module(z, torch.tensor([interventions]).repeat(len(z), 1))
        return pipeline.unet(x, t, text, added_cond_kwargs={"image_embeds": [tokens]}).sample

    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.unet.eval()
    with torch.no_grad():
        for t, s in pairwise(timesteps):
            velocity = predict([1.0, 0.0], t) + predict([0.0, 1.0], t) - predict([0.0, 0.0], t)
            image = alphas[t].sqrt() * x - (1 - alphas[t]).sqrt() * velocity
            noise = alphas[t].sqrt() * velocity + (1 - alphas[t]).sqrt() * x
            x = alphas[s].sqrt() * image + (1 - alphas[s]).sqrt() * noise
    torch.testing.assert_close(sample.latents, x, atol=1e-4, rtol=1e-4)
    assert (x - random.normal(*x.shape)).abs().mean() > 0.1


def test_the_loss_of_samples_is_a_mean_over_the_batch(options):
    """As if each image had either: what is not chosen adds nothing. The sum is not learned from."""
    stage = composing_stage(options)
    stage.step = 6
    batches = stage.batches.batches(6)
    batch, draws, conditions, composed = next(
        inputs for inputs in (stage._inputs(*next(batches)) for _ in range(9)) if inputs[-1] is not None
    )
    objective, count = stage.objective.eval(), len(batch.latents)
    of_images, of_samples = (
        select_rows(conditions, count + len(composed.rows), rows) for rows in (slice(count), slice(count, None))
    )
    noise, timesteps = draws.noise[composed.rows], draws.timesteps[composed.rows]
    noisy = objective.noising.add_noise(composed.batch.latents, noise, timesteps)

    def predict(tokens):
        return objective._predict(noisy, timesteps, of_samples, tokens)

    tokens = objective.context_module(composed.z, composed.batch.mask)
    with torch.no_grad():
        sums = added_prediction(predict, objective.context_module, composed.z, composed.batch.mask)
    losses = (predict(tokens) - sums).square().mean(dim=(1, 2, 3))
    expected = objective(batch, draws, of_images) + losses.sum() / (count / 4)
    loss = objective(batch, draws, conditions, composed)
    assert losses.min() > 1e-5 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weight = objective.context_module.read_out.tokens.weight
    gradients = [torch.autograd.grad(value, weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_learns_the_samples_it_had(options, tmp_path):
    """Their model has learned since: drawn again, they would be others."""
    shared = options | {"composition_weight": 1.0, "max_train_steps": 10, "checkpointing_steps": 8}
    shared |= {"learning_rate": 1e-2, "unfreeze_after": 0.0}
    weights = []
    for resume in (None, "checkpoint-8"):
        _reset_accelerate()
        trainer = create_trainer(shared | {"resume_from_checkpoint": resume})
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.pipeline.unet.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_fsdp_is_refused_with_it(options):
    config = parse_training_config(flags(options | {"composition_weight": 1.0}))
    plugin = SimpleNamespace(fsdp_version=2, auto_wrap_policy=None, activation_checkpointing=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), distributed_type=DistributedType.FSDP, mixed_precision="no"
    )
    with pytest.raises(ValueError, match="set `composition_weight` to 0"):
        check_accelerator(accelerator, config)
