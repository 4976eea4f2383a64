"""Runs whose images are streamed: what a step sees, resuming, two processes, and what cannot work."""

import shutil
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ctx.training.encoding.images import ImageTransform
from diffusers_ctx.training.encoding.latents import encode_images
from diffusers_ctx.training.encoding.streaming import StreamedBatches, open_images
from diffusers_ctx.training.run.keyed_noise import KeyedNoise

from .conftest import create_trainer, encoded_trainer, files_in, load_trainer, make_options
from .test_processes import TRAIN, launch
from .test_training_script import weights_of


STREAMED = {"streaming": True, "streaming_concept_images": 4, "streaming_shuffle_buffer": 3}
NAMED = {"concepts": ["night", "snow"], "train_data_dir": None}


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory) -> Path:
    """The photos in four files that `datasets.load_dataset` streams, each with images of all contexts."""
    folder = tmp_path_factory.mktemp("shards") / "table"
    folder.mkdir()
    files = sorted(photos.rglob("*.png"))
    for index in range(4):
        part = files[index::4]
        columns = {
            "image": [str(file) for file in part],
            "context": [file.parent.name for file in part],
            "text": [f"a street number {file.stem}" for file in part],
        }
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        table.to_parquet(str(folder / f"train-{index}.parquet"))
    return folder


def custom_states(checkpoint: Path) -> list[dict]:
    return [torch.load(file, weights_only=True) for file in checkpoint.glob("custom_checkpoint_*.pkl")]


# what a step sees


def test_contexts_are_balanced_and_images_their_own(options, shards, photos):
    trainer = encoded_trainer(options | STREAMED | NAMED | {"dataset_name": str(shards), "train_batch_size": 6})
    assert len(trainer.latents) == 12 and trainer.concepts == ["night", "snow"]  # the concepts' images
    context_of = {(0, 0): "obs", (1, 0): "night", (0, 1): "snow"}
    names = {"obs": set(), "night": set(), "snow": set()}
    for number, images in enumerate(islice(trainer.batches.images(0), 8)):
        contexts = [context_of[tuple(map(int, mask))] for mask in images.mask]
        assert sorted(contexts) == ["night", "night", "obs", "obs", "snow", "snow"]
        for row, (context, caption) in enumerate(zip(contexts, images.captions)):
            index = caption.removeprefix("a street number ")
            names[context].add(index)
            with Image.open(photos / context / f"{index}.png") as image:
                transform = ImageTransform(32, False, 0)
                torch.testing.assert_close(images.pixels[row], transform(image, number * 6 + row))
    assert {context: len(seen) for context, seen in names.items()} == {"night": 6, "obs": 7, "snow": 5}


def test_images_are_encoded_as_those_up_front_are(options, shards):
    changes = {"dataset_name": str(shards), "random_flip": True, "train_batch_size": 5}
    trainer = encoded_trainer(options | STREAMED | NAMED | changes)
    images = next(trainer.batches.images(0))
    pictures = [
        Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8))
        for pixels in images.pixels
    ]
    columns = {"image": pictures, "context": ["obs"] * 5, "text": [""] * 5}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    transform = ImageTransform(32, True, 0)
    vae = trainer.pipeline.vae
    latents = encode_images(vae, dataset, torch.zeros(5, 2), transform, random_flip=True, show_progress=False)
    key = (0, "test", 0)
    drawn = images.encode(vae, KeyedNoise(*key))
    expected = latents.batch(torch.arange(5), KeyedNoise(*key))
    torch.testing.assert_close(drawn.latents, expected.latents, atol=1e-5, rtol=1e-5)
    left, mirrored = images.geometry
    assert torch.equal(left[:, [0, 1, 2, 4, 5]], mirrored[:, [0, 1, 2, 4, 5]])
    width = 40 * 32 / 36  # of the resized image
    assert ((left[:, 3] + mirrored[:, 3] - (width - 32)).abs() <= 1).all()


# resuming


@pytest.fixture(scope="module")
def undisturbed(base_model, shards, tmp_path_factory) -> SimpleNamespace:
    output_dir = tmp_path_factory.mktemp("streamed") / "adapter"
    options = make_options(
        base_model,
        None,
        output_dir,
        dataset_name=str(shards),
        concepts=["night", "snow"],
        random_flip=True,
        gradient_accumulation_steps=2,
        max_train_steps=7,
        checkpointing_steps=1,
        unfreeze_after=0.5,
        **STREAMED,
    )
    create_trainer(options).train()
    return SimpleNamespace(options=options, output_dir=output_dir)


@pytest.mark.parametrize("step", [0, 1, 3, 6])
def test_a_resumed_run_is_one_that_never_stopped(undisturbed, tmp_path, step):
    output_dir = tmp_path / "adapter"
    shutil.copytree(undisturbed.output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    changes = {"output_dir": str(output_dir), "resume_from_checkpoint": "latest", "checkpointing_steps": 100}
    create_trainer(undisturbed.options | changes).train()
    expected, got = weights_of(undisturbed.output_dir), weights_of(output_dir)
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


def test_the_run_went_through_epochs_and_buffers(undisturbed):
    """So that the steps resumed from lie within them, and what is resumed is not the beginning."""

    def places(step: int) -> list[dict]:
        states = custom_states(undisturbed.output_dir / f"checkpoint-{step}")
        (state,) = [state for state in states if "places" in state]
        assert state["contexts"] == ["night", "obs", "snow"] and len(state["places"]) == 1
        return state["places"][0]

    assert [place["epoch"] for place in places(1)] == [0, 0, 0] and {place["taken"] for place in places(1)} != {3}
    assert min(place["epoch"] for place in places(6)) >= 2
    assert "| images | `streamed, concepts learned on 12` |" in (undisturbed.output_dir / "README.md").read_text()


def test_a_run_of_other_processes_cannot_go_on(undisturbed, monkeypatch, tmp_path):
    file = undisturbed.output_dir / "checkpoint-3" / "options.json"
    folder = shutil.copytree(file.parent, tmp_path / "checkpoint-3")
    (folder / "options.json").write_text(file.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match="other options: `processes` was 2 and is 1"):
        load_trainer(undisturbed.options | {"resume_from_checkpoint": str(folder)})


# two processes

RECORDING = """
import sys
from pathlib import Path
from diffusers_ctx.data.streaming import ContextStream

show = ContextStream.__next__


def record(self):
    image, caption = show(self)
    epoch = self.state_dict()["epoch"]
    file = Path(sys.argv[sys.argv.index("--output_dir") + 1]).parent / f"seen-{self._share_index}.txt"
    with file.open("a") as lines:
        lines.write(f"{epoch}:{self.context}/{caption.split()[-1]}\\n")
    return image, caption


create = ContextStream.__init__


def create_recording(self, stream, context, shuffle_buffer, seed, process_index, *rest):
    self._share_index = process_index
    create(self, stream, context, shuffle_buffer, seed, process_index, *rest)


ContextStream.__init__, ContextStream.__next__ = create_recording, record
"""


def test_two_processes_see_other_images_and_can_go_on(base_model, shards, tmp_path):
    streamed = {"dataset_name": str(shards), "concepts": ["night", "snow"], **STREAMED}
    changes = {"train_batch_size": 2, "max_train_steps": 3, "checkpointing_steps": 1}
    options = make_options(base_model, None, tmp_path / "adapter", **streamed, **changes)
    launched = launch(tmp_path, RECORDING + TRAIN, options)
    assert (tmp_path / "adapter" / "README.md").exists(), launched.stderr
    seen = [(tmp_path / f"seen-{index}.txt").read_text().split("\n")[:-1] for index in range(2)]
    assert min(map(len, seen)) >= 6  # three steps of two images, and what was read ahead
    first_epoch = [{line for line in lines if line.startswith("0:")} for lines in seen]
    assert min(map(len, first_epoch)) >= 4 and not first_epoch[0] & first_epoch[1]

    (place,) = [state for state in custom_states(tmp_path / "adapter" / "checkpoint-1") if "places" in state]
    trainer = load_trainer(options | {"output_dir": str(tmp_path / "other")})
    for index in range(2):
        batches = StreamedBatches(
            open_images(trainer.config),
            place["contexts"],
            trainer.concepts,
            trainer.pipeline.vae,
            32,
            trainer.config,
            SimpleNamespace(process_index=index, num_processes=2),
        )
        batches.load_state_dict(place)
        captions = [caption for images in islice(batches.images(1), 2) for caption in images.captions]
        assert [line.split("/")[1] for line in seen[index][2:6]] == [caption.split()[-1] for caption in captions]


# what cannot work


@pytest.fixture
def refuses(options, tmp_path):
    def check(message: str, **changes) -> None:
        before = files_in(tmp_path)
        with pytest.raises(ValueError, match=message):
            load_trainer(options | STREAMED | changes)
        assert files_in(tmp_path) == before

    return check


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_train_steps": None},
            "With `streaming`, set `max_train_steps`: the number of images in an epoch is not known",
        ),
        ({"cache_latents": True}, "With `streaming`, leave out `cache_latents`"),
        ({"posterior_encoder": "unet"}, "With `streaming`, set `posterior_encoder` to vae"),
        ({"posterior_encoder_model": "clip"}, "With `streaming`, set `posterior_encoder` to vae"),
        ({"validation_images": 1}, "With `streaming`, leave out `validation_images`"),
        ({"max_train_samples": 3}, "give `streaming_concept_images` instead of `max_train_samples`"),
        ({"streaming_concept_images": 0}, "`streaming_concept_images` is 0; it must be 1 or more"),
        ({"concepts": ["sleet"]}, r"`concepts` is \['sleet'\]; choose one or more of \['night', 'snow'\]"),
        ({"obs_context": "plain"}, "no observational context 'plain'; found"),
    ],
)
def test_options_that_cannot_work(refuses, changes, message):
    refuses(message, **changes)


def test_concepts_of_a_dataset_have_to_be_named(refuses, shards):
    refuses("name the `concepts`", train_data_dir=None, dataset_name=str(shards))


def test_an_image_that_cannot_be_read_among_the_first(refuses, photos, tmp_path):
    source = shutil.copytree(photos, tmp_path / "photos")
    (source / "snow" / "0.png").write_bytes(b"no image")
    changes = {"train_data_dir": str(source), "streaming_concept_images": 5}
    refuses(r"An image of the stream cannot be read: .*snow/0\.png.*`skip_unreadable`", **changes)


def test_an_image_that_cannot_be_read_later_stops_the_run(options, photos, tmp_path):
    source = shutil.copytree(photos, tmp_path / "photos")
    trainer = encoded_trainer(options | STREAMED | {"train_data_dir": str(source), "max_train_steps": 20})
    for file in (source / "night").glob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"An image of the stream cannot be read: .*night/\d\.png"):
        trainer.learn_concepts()
        trainer.learn_adapter()
    assert not (tmp_path / "adapter" / "README.md").exists()
