"""Captions that are longer than the text encoders take are counted once, and their text is never shown."""

import logging
import shutil

import pytest
from conftest import make_pipeline, make_xl_pipeline

from diffusers_ctx.pipelines import describe_truncated, truncation_unsaid

from .conftest import IMAGES, WITHOUT_SEARCH, create_trainer


LONG = "a street " * 30
LIBRARIES = ("diffusers", "transformers", "diffusers_ctx")


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


@pytest.fixture
def said():
    """What the libraries have warned of."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    yield records
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture
def long_captions(photos, tmp_path, options):
    """Photos of which those of `snow` have long captions."""
    root = shutil.copytree(photos, tmp_path / "photos")
    table = root / "snow" / "metadata.csv"
    table.write_text(table.read_text().replace("a street", LONG))
    options["train_data_dir"] = str(root)
    return options


@pytest.mark.parametrize(
    "changes",
    [
        {"validation_images": 1, "validation_prompt": "a street", "num_validation_images": 1},
        {"cache_latents": True},
        {"train_text_encoder": True},
    ],
)
def test_a_run_counts_them_once(long_captions, tmp_path, said, changes):
    create_trainer(long_captions | {"cache_dir": str(tmp_path / "cache")} | changes).train()
    about = [message for message in said if "token" in message or "street" in message]
    expected = f"{IMAGES['snow']} of {sum(IMAGES.values())} captions are longer than the 24 tokens that the text"
    assert about == [f"{expected} encoder takes; the rest is cut off."]


def test_a_long_prompt_of_the_validation_is_said_once(options, said):
    create_trainer(options | {"validation_prompt": LONG, "num_validation_images": 1, "validation_steps": 1}).train()
    about = [message for message in said if "token" in message or "street" in message]
    assert about == [
        "1 of 1 validation prompts are longer than the 24 tokens that the text encoder takes; the rest is cut off."
    ]


@pytest.mark.parametrize("make", [make_pipeline, make_xl_pipeline])
def test_they_are_counted_by_the_images_that_have_them(make, said):
    pipeline = make()
    assert describe_truncated(pipeline, ["", "a street"]) is None and describe_truncated(pipeline, []) is None
    line = describe_truncated(pipeline, ["", "a street", LONG, LONG, "a " * 22, "a " * 23])
    assert line == "3 of 5 captions are longer than the 24 tokens that the text encoder takes; the rest is cut off."
    assert said == []


def test_xl_counts_what_either_tokenizer_cuts_off():
    pipeline = make_xl_pipeline()
    pipeline.tokenizer_2 = type(pipeline.tokenizer).from_pretrained(
        pipeline.tokenizer.name_or_path, subfolder="tokenizer", model_max_length=6
    )
    assert "1 of 2 captions are longer than the 6 tokens" in describe_truncated(pipeline, ["a", "a " * 8])


def test_outside_of_runs_the_pipeline_still_warns(said):
    pipeline = make_pipeline()
    with truncation_unsaid(pipeline):
        pipeline(LONG, num_inference_steps=1, output_type="latent")
    assert said == []
    pipeline(LONG, num_inference_steps=1, output_type="latent")
    assert any("input was truncated" in message for message in said)
