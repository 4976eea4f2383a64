"""Whether noise earns its place: noise that says something about held-out images stays, noise that does not goes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CONCEPTS
from diffusers import DDPMScheduler
from PIL import Image

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import attach_context_module, context_attention_layers
from diffusers_ctx.adapter.backbones.noising import Diffusion
from diffusers_ctx.adapter_format import CONFIG_NAME
from diffusers_ctx.context.posterior import GaussianPosterior
from diffusers_ctx.training.diffusion.noise_trial import NoiseTrial, trial_images
from diffusers_ctx.training.diffusion.objective import DiffusionObjective, Draws
from diffusers_ctx.training.encoding.batch import Batch
from diffusers_ctx.training.encoding.latents import ContextLatents
from diffusers_ctx.training.run.keyed_noise import KeyedNoise

from .conftest import _reset_accelerate, create_stage, create_trainer, encoded_trainer, files_in, make_options


def test_noise_is_left_out_of_the_values(context_module):
    z, mask = torch.randn(5, *context_module.noise_shape), torch.eye(3).repeat(2, 1)[:5]
    with_noise = context_module.concept_values(z, mask)
    context_module.leave_out_noise(["night"])
    column = context_module.node_names.index("night")
    without = z.clone()
    without[:, column] = 0
    values = context_module.concept_values(z, mask)
    assert not torch.equal(values, with_noise)
    context_module.leave_out_noise([])
    torch.testing.assert_close(values, context_module.concept_values(without, mask))
    assert torch.equal(context_module.concept_values(z, mask), with_noise)


def test_what_is_left_out_is_saved_and_loaded(context_module, tmp_path):
    context_module.leave_out_noise(["night", "hidden_0"])
    context_module.save_pretrained(tmp_path)
    loaded = type(context_module).from_pretrained(tmp_path)
    z, mask = torch.randn(2, *loaded.noise_shape), torch.zeros(2, 3)
    torch.testing.assert_close(loaded.concept_values(z, mask), context_module.concept_values(z, mask))
    assert loaded.config.nodes_without_noise == ["night", "hidden_0"]


def test_a_node_that_is_not_there(context_module):
    with pytest.raises(ValueError, match=r"names \['rain'\]; the nodes are"):
        context_module.leave_out_noise(["rain"])


@pytest.mark.parametrize(
    "sizes, expected", [((32, 40), 4), ((31, 40), 0), ((7, 50), 0), ((300, 1000), 0), ((299, 1000), 37)]
)
def test_an_eighth_of_few_images_is_held_out(sizes, expected):
    assert trial_images(["obs"] * sizes[0] + ["night"] * sizes[1]) == expected


def test_a_fifth_of_the_images_learns_without_noise_until_the_decision():
    trial = NoiseTrial(make_latents(1), 4, 0)
    kept = trial.kept(4000, KeyedNoise(0, "test", 0))
    assert set(kept.tolist()) == {0.0, 1.0} and 0.77 < kept.mean() < 0.83
    trial.goes_without = False
    assert trial.kept(4, KeyedNoise(0, "test", 0)) is None


class ToyObjective:
    """The squared distance of noise to the true one, which latents hold; inferred noise correlates with it."""

    def __init__(self, correlation: float):
        self.context_module, self.noising, self.correlation = self, Diffusion(DDPMScheduler().config), correlation
        self.noise_shape, self.timesteps = (8, 2), []

    def posterior(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        true, other = (latents[:, channel, 0].unflatten(1, self.noise_shape) for channel in (0, 1))
        mean = self.correlation * true + (1 - self.correlation**2) ** 0.5 * other
        return GaussianPosterior.diagonal(mean, torch.zeros_like(mean))

    def losses(self, batch: Batch, draws: Draws, conditions: dict, exogenous_noise: torch.Tensor) -> torch.Tensor:
        assert conditions == {"text": 1}
        self.timesteps += draws.timesteps.tolist()
        true = batch.latents[:, 0, 0].unflatten(1, self.noise_shape)
        return draws.noise.mean(dim=(1, 2, 3)) + (exogenous_noise - true).square().mean(dim=(1, 2))


def make_latents(number: int) -> ContextLatents:
    masks = torch.cat([torch.zeros(1, 3), torch.eye(3)]).repeat_interleave(number, 0)
    contexts = [name for name in ("obs", *CONCEPTS) for _ in range(number)]
    latents, geometry = torch.randn(1, len(masks), 4, 16, 16), torch.zeros(1, len(masks), 6)
    return ContextLatents(latents, torch.ones_like(latents), masks, contexts, [""] * len(masks), geometry)


@pytest.mark.parametrize("correlation", [1.0, 0.75, 0.5, 0.0])
def test_inferred_noise_lowers_the_loss_by_what_its_correlation_with_the_true_one_says(correlation):
    latents = make_latents(60)
    results = []
    for batch_size in (240, 77):
        objective = ToyObjective(correlation)
        trial = NoiseTrial(latents, batch_size, 0)
        gain, harm = trial.effects(objective, lambda captions, geometry: {"text": 1}, torch.device("cpu"))
        assert 600 <= min(objective.timesteps) < 640 < 960 < max(objective.timesteps) < 1000
        results.append((gain, harm))
    assert gain / harm == pytest.approx(2 * correlation - 1, abs=0.05)
    assert results[1] == pytest.approx(results[0], rel=1e-3)  # however many images there are at once


def test_the_loss_without_noise_is_that_of_noise_zero(plain_pipeline, context_module):
    unet = plain_pipeline.unet
    attach_context_module(unet, context_module)
    for layer in context_attention_layers(unet).values():
        torch.nn.init.normal_(layer["value"].weight)
    torch.nn.init.normal_(context_module.head.layers[-1].weight)
    objective = DiffusionObjective(unet, DDPMScheduler())
    images = Batch(torch.randn(2, 4, 16, 16), None, torch.eye(3)[:2], torch.zeros(2, 6), [])
    conditions = {"encoder_hidden_states": torch.randn(2, 5, 32)}
    draws = Draws(torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.randn(2, *context_module.noise_shape))
    with torch.no_grad():
        all_kept = objective.losses(images, draws._replace(kept=torch.ones(2)), conditions)
        none_kept = objective.losses(images, draws._replace(kept=torch.zeros(2)), conditions)
        torch.testing.assert_close(all_kept, objective.losses(images, draws, conditions))
        zeros = torch.zeros(2, *context_module.noise_shape)
        zero = GaussianPosterior.diagonal(zeros, zeros - 100)
        context_module.posterior = lambda *_: zero
        torch.testing.assert_close(none_kept, objective.losses(images, draws, conditions))
    assert (all_kept - none_kept).abs().min() > 1e-6
    torch.testing.assert_close(none_kept, objective.losses(images, draws, conditions, zeros))


@pytest.fixture
def few_photos(tmp_path):
    """Twenty-four pictures a context, of which three are held out."""
    rng = np.random.default_rng(0)
    for shade, context in zip((40, 100, 200), ("obs", "night", "snow")):
        folder = tmp_path / "few" / context
        folder.mkdir(parents=True)
        for index in range(24):
            pixels = rng.normal(shade, 40, (36, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path / "few"


def measure_and_find(monkeypatch, gain):
    """Lets a trial measure as ever, and find that noise has this gain and a harm of one."""
    effects = NoiseTrial.effects

    def measured(*args):
        assert np.isfinite(effects(*args)).all()
        return gain, 1.0

    monkeypatch.setattr(NoiseTrial, "effects", measured)


def test_a_run_on_few_images_decides_and_keeps_to_it_when_it_is_resumed(base_model, few_photos, tmp_path, monkeypatch):
    measure_and_find(monkeypatch, 0.4)
    options = make_options(base_model, few_photos, tmp_path / "adapter", max_train_steps=4, checkpointing_steps=3)
    trainer = create_trainer(options)
    trainer.train()
    assert len(trainer.latents) == 3 * 21
    without = trainer.context_module.config.nodes_without_noise
    assert without == trainer.context_module.node_names
    saved = files_in(tmp_path / "adapter")
    pipeline = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    pipeline.load_context_adapter(tmp_path / "adapter")
    assert pipeline.context_module.config.nodes_without_noise == without
    shutil.copytree(tmp_path / "adapter", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    _reset_accelerate()
    resumed = create_trainer(options | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"})
    resumed.train()
    assert json.loads(saved[CONFIG_NAME])["format_version"] == 2  # which older versions refuse
    assert resumed.context_module.config.nodes_without_noise == without
    weights = "context_adapter.safetensors"
    assert files_in(tmp_path / "resumed")[weights] == saved[weights]


def test_noise_that_is_confirmed_stays(base_model, few_photos, tmp_path, monkeypatch):
    measure_and_find(monkeypatch, 0.6)
    trainer = create_trainer(make_options(base_model, few_photos, tmp_path / "adapter", use_ema=True))
    trainer.train()
    assert trainer._trial.goes_without is False
    assert trainer.context_module.config.nodes_without_noise == []
    assert json.loads(files_in(tmp_path / "adapter")[CONFIG_NAME])["format_version"] == 1


def test_combinations_are_learned_by_default_where_there_is_no_noise(options):
    learned = {}
    for without in (False, True):
        _reset_accelerate()
        trainer = encoded_trainer(options | {"max_train_steps": 2})
        module = trainer.context_module
        module.leave_out_noise(module.node_names if without else [])
        stage = create_stage(trainer)
        stage.step = 1
        learned[without] = stage._inputs(*next(trainer.batches.batches(1)))[1].combinations
        assert stage.objective.composition_weight == 1
    assert learned[False] is None and learned[True] is not None


@pytest.mark.parametrize("changes, held_out", [({"try_noise": False}, 0), ({"validation_images": 5}, 15)])
def test_a_trial_can_be_switched_off_and_takes_the_images_that_are_held_out(
    base_model, few_photos, tmp_path, changes, held_out
):
    trainer = encoded_trainer(make_options(base_model, few_photos, tmp_path / "adapter", **changes))
    assert len(trainer._held_out_images) == held_out
    assert (trainer._trial is None) == (held_out == 0)
    assert (trainer.validator.held_out is None) == (held_out == 0)


def test_validation_losses_are_logged_for_those_who_ask_alone(base_model, few_photos, tmp_path):
    trainer = encoded_trainer(make_options(base_model, few_photos, tmp_path / "adapter"))
    assert len(trainer._trial.held_out) == 9 and trainer.validator.held_out is None


def test_with_too_few_images_nothing_is_held_out(base_model, photos, tmp_path):
    trainer = encoded_trainer(make_options(base_model, photos, tmp_path / "adapter"))
    assert trainer._trial is None and not len(trainer._held_out_images)


def test_a_module_without_noise_is_made_again_from_its_configuration(base_model, few_photos, tmp_path):
    module = encoded_trainer(make_options(base_model, few_photos, tmp_path / "adapter")).context_module
    module.leave_out_noise(module.node_names)
    again = type(module).from_config(module.config)
    assert again.config.nodes_without_noise == module.node_names and not again.has_noise.any()
    assert not module.knows_captions
