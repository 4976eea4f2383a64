"""The loss on held-out images: of which images, at which timesteps, and that it can be compared."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_ctx.data.held_out import hold_out
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training.diffusion.objective import Draws
from diffusers_ctx.training.diffusion.validation import validation_losses
from diffusers_ctx.training.encoding.batch import Batch

from .conftest import IMAGES, WITHOUT_SEARCH, create_stage, create_trainer, encoded_trainer, load_trainer
from .test_training_script import weights_of


CONTEXTS = ["obs"] * 5 + ["snow"] * 3


def test_so_many_of_each_context_are_held_out():
    train, held_out = hold_out(CONTEXTS, 2, seed=0)
    assert sorted(train + held_out) == list(range(8)) and train == sorted(train)
    assert [CONTEXTS[row] for row in held_out] == ["obs"] * 2 + ["snow"] * 2
    assert hold_out(CONTEXTS, 2, seed=0) == (train, held_out)
    assert len({tuple(hold_out(CONTEXTS, 2, seed)[1]) for seed in range(20)}) > 5
    assert hold_out(CONTEXTS, 0) == (list(range(8)), [])
    with pytest.raises(ValueError, match="'snow' has 3 images, so 3 cannot"):
        hold_out(CONTEXTS, 3)


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


@pytest.fixture
def trainer(options):
    trainer = encoded_trainer(options | {"validation_images": 3, "mode": "frozen"})
    create_stage(trainer)
    return trainer


def losses_of(trainer, **changes) -> dict[str, float] | None:
    arguments = {"latents": trainer.validator.held_out, "batch_size": 4, "stop": trainer.stop} | changes
    return validation_losses(trainer.adapter_stage.objective, trainer.pipeline, **arguments)


def test_a_signal_is_not_kept_waiting(options):
    changes = {"validation_images": 3, "mode": "frozen", "validation_prompt": "a street"}
    trainer = encoded_trainer(options | changes)
    create_stage(trainer)
    with trainer.stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert losses_of(trainer) is None
    trainer.validate(2)
    assert not (trainer.output_dir / "validation").exists()


def test_held_out_images_are_not_trained_on(trainer):
    held_out = trainer.validator.held_out
    assert len(held_out) == 9 and len(trainer.latents) == sum(IMAGES.values()) - 9
    train = {latent.numpy().tobytes() for latent in trainer.latents.mean[0]}
    assert not any(latent.numpy().tobytes() in train for latent in held_out.mean[0])
    assert len(trainer.batches.sampler) == 3 * (max(IMAGES.values()) - 3)


def test_the_loss_is_the_objectives_at_spread_timesteps(trainer):
    held_out, conditioner = trainer.validator.held_out, Conditioner.of(trainer.pipeline)
    losses = losses_of(trainer)
    noise = torch.randn(held_out.mean.shape[1:], generator=torch.Generator().manual_seed(0))
    for context in IMAGES:
        rows = [row for row, name in enumerate(held_out.contexts) if name == context]
        expected = []
        for row, timestep in zip(rows, (166, 500, 833)):  # middles of thirds of 1000
            encoded = conditioner.encode_captions([held_out.captions[row]])
            conditions = conditioner.model_kwargs(encoded, held_out.geometry[0, [row]])
            nothing = torch.zeros(1, *trainer.context_module.noise_shape)
            batch = Batch(
                held_out.mean[0, [row]],
                held_out.features[0, [row]],
                held_out.masks[[row]],
                held_out.geometry[0, [row]],
                [held_out.captions[row]],
            )
            with torch.no_grad():
                draws = Draws(noise[[row]], torch.tensor([timestep]), nothing)
                expected.append(trainer.adapter_stage.objective(batch, draws, conditions).item())
        assert losses[context] == pytest.approx(np.mean(expected), rel=1e-4)


def test_losses_can_be_compared(trainer):
    expected = losses_of(trainer)
    torch.randn(7)
    assert losses_of(trainer) == expected
    assert losses_of(trainer, batch_size=2) == pytest.approx(expected, rel=1e-4)
    trainer.adapter_stage.objective.snr_gamma = 0.1
    assert losses_of(trainer) == expected


def test_held_out_are_the_same_images_and_crops_whatever_the_seed(options):
    one, other = (encoded_trainer(options | {"validation_images": 3, "seed": seed}) for seed in (0, 1))
    for name in ("mean", "geometry", "masks"):
        assert torch.equal(getattr(one.validator.held_out, name), getattr(other.validator.held_out, name))
    assert not torch.equal(one.latents.geometry, other.latents.geometry)


def test_a_context_called_mean_keeps_its_curve(options, photos, tmp_path):
    options["train_data_dir"] = str(shutil.copytree(photos, tmp_path / "photos"))
    (tmp_path / "photos" / "night").rename(tmp_path / "photos" / "mean")
    folder = create_trainer(options | {"validation_images": 2, "report_to": "tensorboard"}).train()
    events = EventAccumulator(str(folder / "logs" / "context-adapter")).Reload()
    losses = {name: events.Scalars(f"validation_loss/{name}")[-1].value for name in ("obs", "mean", "snow")}
    mean = events.Scalars("mean_validation_loss")[-1].value
    assert mean == pytest.approx(sum(losses.values()) / 3) and mean != losses["mean"]


def test_they_are_logged_and_change_nothing(options, tmp_path):
    changes = {"max_train_steps": 4, "validation_steps": 2, "validation_images": 2, "report_to": "tensorboard"}
    folder = create_trainer(options | changes | {"use_ema": True}).train()
    events = EventAccumulator(str(folder / "logs" / "context-adapter")).Reload()
    for name in ("validation_loss/obs", "validation_loss/night", "validation_loss/snow", "mean_validation_loss"):
        assert [event.step for event in events.Scalars(name)] == [2, 4]
    assert not (folder / "validation").exists()
    silent = create_trainer(
        options | changes | {"use_ema": True, "validation_steps": 100, "output_dir": str(tmp_path / "silent")}
    ).train()
    expected, got = weights_of(silent), weights_of(folder)  # not bytes: a file's metadata are in any order
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert json.loads((folder / "training_config.json").read_text())["validation_images"] == 2


def test_too_many_are_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(ValueError, match="lower `validation_images`"):
        load_trainer(options | {"validation_images": 5})
    assert not (tmp_path / "adapter").exists()


def test_samples_have_the_size_of_training(options, tmp_path):
    shown = {"validation_prompt": "a street", "validation_steps": 2, "num_validation_images": 1}
    create_trainer(options | shown | {"resolution": 64, "max_train_steps": 2}).train()
    with Image.open(tmp_path / "adapter" / "validation" / "step-2.png") as grid:
        assert grid.width == 64


def test_the_last_step_is_validated_with_the_guidance_that_is_asked_for(options, tmp_path):
    shown = {"validation_prompt": "a street", "validation_steps": 5, "num_validation_images": 1, "max_train_steps": 1}
    grids = {}
    for scale in (1.0, 7.5):
        folder = tmp_path / str(scale)
        create_trainer(options | shown | {"output_dir": str(folder), "validation_guidance_scale": scale}).train()
        with Image.open(folder / "validation" / "step-1.png") as grid:
            grids[scale] = np.asarray(grid)
    assert (grids[1.0] != grids[7.5]).any()
