"""A posterior that sees features: the same in training and at inference, through cache, checkpoints and processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPVisionConfig, CLIPVisionModel

from diffusers_ctx import ComposableImg2ImgPipeline, ComposablePipeline, ComposableXLPipeline
from diffusers_ctx.adapter import context_attention_layers
from diffusers_ctx.training import ContextTrainer, parse_training_config
from diffusers_ctx.training.diffusion.validation import validation_losses
from diffusers_ctx.training.encoding.images import ImageTransform, load_images
from diffusers_ctx.training.run.keyed_noise import KeyedNoise

from .conftest import (
    SCRIPT,
    WITHOUT_SEARCH,
    create_stage,
    create_trainer,
    encoded_trainer,
    flags,
    launch_forked,
    load_trainer,
    make_options,
)
from .test_training_script import weights_of


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoders(clip) -> dict[str, dict]:
    return {
        "unet": {"posterior_encoder": "unet"},
        "clip": {"posterior_encoder": "clip", "posterior_encoder_model": str(clip)},
    }


@pytest.fixture(scope="module")
def clip_adapter(base_model, photos, encoders, tmp_path_factory) -> Path:
    changes = encoders["clip"] | WITHOUT_SEARCH
    return create_trainer(make_options(base_model, photos, tmp_path_factory.mktemp("clip"), **changes)).train()


def load(base: Path, adapter: Path) -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(base, safety_checker=None)
    pipeline.load_context_adapter(adapter)
    return pipeline


def assert_sees_what_training_saw(pipeline: DiffusionPipeline, trainer: ContextTrainer) -> None:
    """On training images, flipped ones too: features, and the noise that they are explained by."""
    dataset, transform = load_images(trainer.config), ImageTransform(32, trainer.config.data.center_crop, seed=0)
    rows = range(0, len(dataset), 5)
    pixels = torch.stack([transform(dataset[row]["image"], row) for row in rows])
    views = [pixels, pixels.flip(-1)][: len(trainer.latents.mean)]
    for features, view in zip(trainer.latents.features, views, strict=True):
        latents = pipeline._encode_images(view)
        seen = pipeline._posterior_input(view, latents)
        torch.testing.assert_close(seen, features[list(rows)], atol=1e-5, rtol=1e-4)
        noise = trainer.context_module.posterior(features[list(rows)], torch.zeros(len(rows), 2)).mean.detach()
        torch.testing.assert_close(pipeline.infer_exogenous_noise(view / 2 + 0.5), noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("encoder", "changes"),
    [
        ("unet", {"mode": "lora", "train_text_encoder": True, "unfreeze_after": 0.0, "random_flip": True}),
        ("unet", {"mode": "frozen", "injection": "prompt", "posterior_type": "amortized"}),
        ("clip", {"mode": "full", "unfreeze_after": 0.0, "random_flip": True}),
    ],
)
def test_features_and_noise_are_those_of_training(options, encoders, base_model, clip, encoder, changes):
    trainer = create_trainer(options | encoders[encoder] | changes | {"use_ema": True})
    adapter = trainer.train()
    standardized = trainer.context_module.encoder.layers[0](trainer.latents.features.flatten(0, 1))
    deviation, mean = torch.std_mean(standardized, dim=(0, 2, 3))
    torch.testing.assert_close((mean, deviation), (torch.zeros_like(mean), torch.ones_like(mean)), atol=1e-3, rtol=0)
    pipeline = load(adapter if changes["mode"] == "full" else base_model, adapter)
    if encoder == "clip":
        assert pipeline.context_module.config.posterior_encoder_model == "tiny-clip"  # no path of this machine
        pipeline.load_posterior_encoder(str(clip))
    assert_sees_what_training_saw(pipeline, trainer)
    image = torch.rand(1, 3, 32, 32)
    made = [pipeline.counterfactual(image, x, num_inference_steps=1, output_type="pt").images for x in ([], ["snow"])]
    assert not torch.equal(*made)


def test_the_loss_on_held_out_images_is_given_their_features(options, encoders):
    trainer = encoded_trainer(options | encoders["unet"] | {"validation_images": 2, "mode": "frozen"})
    held_out = trainer.validator.held_out
    assert held_out.features.shape == (1, 6, 16, 8, 8)
    stage = create_stage(trainer)
    for layer in context_attention_layers(trainer.pipeline.unet).values():
        torch.nn.init.normal_(layer["value"].weight)  # zeros at first: tokens would not matter

    def losses() -> dict[str, float]:
        return validation_losses(stage.objective, trainer.pipeline, held_out, batch_size=4, stop=trainer.stop)

    before = losses()
    held_out.features = held_out.features[:, [1, 0, 2, 3, 4, 5]]
    changed = {name for name, loss in losses().items() if loss != before[name]}
    assert changed == {held_out.contexts[0]}


def test_features_and_noise_are_those_of_training_with_xl(xl_base_model, photos, tmp_path, encoders):
    options = make_options(xl_base_model, photos, tmp_path, **encoders["unet"], unfreeze_after=0.0)
    config = parse_training_config(flags(options))
    trainer = ContextTrainer(config, ComposableXLPipeline.from_pretrained(xl_base_model))
    trainer.train()
    pipeline = ComposableXLPipeline.from_pretrained(xl_base_model)
    pipeline.load_context_adapter(tmp_path)
    assert_sees_what_training_saw(pipeline, trainer)


def test_flipped_images_have_features_of_their_own(options, encoders):
    kept, rows = encoded_trainer(options | encoders["unet"] | {"random_flip": True}).latents, torch.arange(6)
    batch = kept.batch(rows, KeyedNoise(0, "test", 0))
    latents, features = batch.latents, batch.features
    drawn = [(features[place] - kept.features[:, row]).flatten(1).norm(dim=1) for place, row in enumerate(rows)]
    views = torch.stack(drawn).argmin(dim=1)
    assert (torch.stack(drawn).min(dim=1).values == 0).all() and len(views.unique()) == 2
    for place, (row, view) in enumerate(zip(rows, views)):  # and the latents are of the same view
        distances = (latents[place] - kept.mean[:, row]).abs() / kept.std[:, row]
        assert distances.flatten(1).mean(dim=1).argmin() == view


def test_features_are_cached_with_what_made_them(options, encoders, tmp_path):
    cached = options | {"cache_latents": True, "cache_dir": str(tmp_path / "cache"), "posterior_encoder": "vae"}

    def files() -> set[Path]:
        return set((tmp_path / "cache").rglob("latents-*"))

    encoded_trainer(cached)
    of_latents = files()
    first = encoded_trainer(cached | encoders["unet"]).latents.features
    assert len(files()) == 2
    assert torch.equal(encoded_trainer(cached | encoders["unet"]).latents.features, first)
    assert encoded_trainer(cached).latents.features is None
    assert len(files()) == 2 and of_latents < files()
    assert encoded_trainer(cached | encoders["clip"]).latents.features.shape == (1, 18, 8, 4, 4)
    assert len(files()) == 3


def test_a_run_that_is_resumed_learns_the_same(options, encoders, tmp_path):
    options |= encoders["unet"] | {"max_train_steps": 3, "checkpointing_steps": 2}
    expected = weights_of(create_trainer(options).train())
    other = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    shutil.copytree(tmp_path / "adapter" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    got = weights_of(create_trainer(options | other).train())
    assert any(name.endswith("encoder.layers.0.std") for name in expected)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="`posterior_encoder` was unet and is vae"):
        load_trainer(options | other | {"posterior_encoder": "vae"})


def test_two_processes_learn_what_one_does(options, encoders, tmp_path):
    options |= encoders["unet"] | {"random_flip": True, "learning_rate": 1e-3, "adam_epsilon": 1e-3}
    expected = weights_of(create_trainer(options).train())
    folder = tmp_path / "two"
    run = launch_forked(SCRIPT, flags(options | {"output_dir": str(folder), "train_batch_size": 2}))
    assert (folder / "README.md").exists(), run.stderr
    got = weights_of(folder)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4)


# a CLIP model that is not there, and one that the pipeline has


def test_only_abduction_needs_the_clip_model(clip_adapter, base_model, clip):
    pipeline = load(base_model, clip_adapter)
    pipeline("a street", interventions=["snow"], num_inference_steps=1)
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match="'tiny-clip' cannot be loaded; give the folder"):
        pipeline.infer_exogenous_noise(image)
    pipeline.load_posterior_encoder(str(clip))
    expected = pipeline.infer_exogenous_noise(image)
    relative = ComposableImg2ImgPipeline.from_pipe(pipeline)
    assert relative._clip_features is pipeline._clip_features
    relative.unload_context_adapter()
    assert pipeline._clip_features is None

    pipeline = load(base_model, clip_adapter)
    pipeline.register_modules(image_encoder=CLIPVisionModel.from_pretrained(clip))
    assert torch.equal(pipeline.infer_exogenous_noise(image), expected)
    shape = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    pipeline.register_modules(image_encoder=CLIPVisionModel(CLIPVisionConfig(**shape, image_size=16, patch_size=4)))
    with pytest.raises(
        ValueError, match=r"features of 4 channels, and the adapter's posterior takes 8: call .*tiny-clip"
    ):
        pipeline.infer_exogenous_noise(image)


def test_a_name_that_can_be_loaded_is_loaded_when_it_is_needed(clip_adapter, base_model, clip, monkeypatch):
    monkeypatch.chdir(clip.parent)  # where the recorded name is that of a folder
    pipeline = load(base_model, clip_adapter)
    assert pipeline._clip_features is None
    assert (
        pipeline.infer_exogenous_noise(torch.rand(1, 3, 32, 32)).isfinite().all()
        and pipeline._clip_features is not None
    )


def test_the_image_encoder_of_the_base_model_is_taken(options, base_model, clip):
    own = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    own.register_modules(image_encoder=CLIPVisionModel.from_pretrained(clip))
    given = {"posterior_encoder": "clip"} | WITHOUT_SEARCH
    adapter = ContextTrainer(parse_training_config(flags(options | given)), own).train()
    config = json.loads((adapter / "context_module" / "config.json").read_text())
    assert config["posterior_encoder"] == "clip" and config["posterior_encoder_model"] is None
    with pytest.raises(ValueError, match="has an image encoder of its own; leave out `posterior_encoder_model`"):
        both = given | {"posterior_encoder_model": str(clip), "output_dir": options["output_dir"] + "2"}
        ContextTrainer(parse_training_config(flags(options | both)), own).load()
    with pytest.raises(ValueError, match="load one that has it as component `image_encoder`"):
        load(base_model, adapter).infer_exogenous_noise(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "unet"),
        ({"mode": "full"}, "vae"),
        ({"posterior_encoder": "vae"}, "vae"),
        ({"streaming": True, "streaming_concept_images": 2, "max_train_steps": 1}, "vae"),
    ],
)
def test_by_default_the_posterior_reads_features_where_there_are_any(options, changes, expected):
    trainer = encoded_trainer(options | changes)
    assert trainer.context_module.config.posterior_encoder == expected
    assert (trainer.latents.features is None) == (expected == "vae")
