"""`--train_text_encoder`: a LoRA of the text encoder learns with that of the UNet."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from diffusers_ctx import ComposablePipeline, ComposableXLPipeline
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training import ContextTrainer, parse_training_config

from .conftest import SCRIPT, WITHOUT_SEARCH, XL_SCRIPT, flags, launch_forked, make_options
from .test_trainable import moved
from .test_training_script import weights_of


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["base_model", "xl_base_model"])
def base(request) -> Path:
    return request.getfixturevalue(request.param)


def load_pipeline(base: Path):
    pipeline = (ComposableXLPipeline if base.name.endswith("-xl") else ComposablePipeline).from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train(base: Path, photos: Path, output_dir: Path, **changes):
    """The pipeline that was trained."""
    options = {"train_text_encoder": True, "unfreeze_after": 0.5, "max_train_steps": 4, "learning_rate": 1e-3}
    options = make_options(base, photos, output_dir, **WITHOUT_SEARCH | options | changes)
    trainer = ContextTrainer(parse_training_config(flags(options)), load_pipeline(base))
    trainer.train()
    return trainer.pipeline


def sample(pipeline, **arguments) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)}
    return pipeline("a street number 3", **options | arguments).images


def text_encoders(pipeline) -> dict[str, PreTrainedModel]:
    return Conditioner.of(pipeline).text_encoders


def trained_at(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the text encoders."""
    weights = safetensors.torch.load_file(output_dir / f"checkpoint-{step}" / "trained.safetensors")
    return {name: weight for name, weight in weights.items() if "text_encoder" in name}


@pytest.fixture(scope="module")
def run(base, photos, tmp_path_factory) -> SimpleNamespace:
    """A run with a checkpoint after each step. The LoRA is unfrozen after the second, at half of training."""
    options = {"max_train_steps": 5, "checkpointing_steps": 1, "use_ema": True}
    output_dir = tmp_path_factory.mktemp("run") / "adapter"
    return SimpleNamespace(options=options, output_dir=output_dir, pipeline=train(base, photos, output_dir, **options))


def test_the_lora_learns_and_all_else_in_the_text_encoders_stays(base, run):
    before = {name: model.state_dict() for name, model in text_encoders(load_pipeline(base)).items()}
    states = [trained_at(run.output_dir, step) for step in range(1, 5)]
    assert all(".lora_" in name and any(part in name for part in PROJECTIONS) for name in states[0])
    # the last layer of the first text encoder of SDXL has no part in what the UNet is told
    idle = {name for name in states[0] if ".text_encoder." in name and "layers.1." in name}
    assert moved(states[0], states[1]) == set()  # it is unfrozen with the UNet's LoRA
    assert moved(states[1], states[3]) == states[0].keys() - idle
    for name, model in text_encoders(run.pipeline).items():
        after = {key.replace(".base_layer", ""): weight for key, weight in model.state_dict().items()}
        assert len(after) > len(before[name])
        assert all(torch.equal(after[key], weight) for key, weight in before[name].items())


def test_the_saved_adapter_gives_the_images_of_the_pipeline_that_trained(base, photos, tmp_path):
    expected = sample(train(base, photos, tmp_path, unfreeze_after=0.0, learning_rate=1e-2), interventions=["snow"])
    fresh = load_pipeline(base)
    states = {name: model.state_dict() for name, model in text_encoders(load_pipeline(base)).items()}
    plain = sample(fresh)
    fresh.load_context_adapter(tmp_path)
    np.testing.assert_allclose(sample(fresh, interventions=["snow"]), expected, atol=1e-5)
    with_text_lora = sample(fresh, interventions=["snow"])
    for model in text_encoders(fresh).values():
        model.disable_adapters()
    assert np.abs(sample(fresh, interventions=["snow"]) - with_text_lora).max() > 1e-4

    fresh.unload_context_adapter()
    for name, model in text_encoders(fresh).items():
        after = model.state_dict()
        assert after.keys() == states[name].keys()
        assert all(torch.equal(after[key], weight) for key, weight in states[name].items())
    np.testing.assert_array_equal(sample(fresh), plain)
    fresh.load_context_adapter(tmp_path)  # as if it were the first time
    np.testing.assert_array_equal(sample(fresh, interventions=["snow"]), with_text_lora)


def test_the_weights_are_a_lora_of_diffusers_and_name_no_folder(base, run):
    parts = {key.split(".")[0] for key in safetensors.torch.load_file(run.output_dir / LORA_WEIGHTS)}
    assert parts == {"unet", *text_encoders(run.pipeline)}
    assert str(base).encode() not in (run.output_dir / LORA_WEIGHTS).read_bytes()
    stock = DiffusionPipeline.from_pretrained(base)
    stock.load_lora_weights(str(run.output_dir))
    assert set(stock.get_list_adapters()) == parts


def test_resuming_is_never_having_stopped(base, photos, run, tmp_path):
    shutil.copytree(run.output_dir / "checkpoint-3", tmp_path / "checkpoint-3")
    train(base, photos, tmp_path, resume_from_checkpoint="latest", **run.options)
    expected, got = weights_of(run.output_dir), weights_of(tmp_path)
    assert got.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(got[name], expected[name])]


def test_gradient_checkpointing_changes_no_result(base, photos, tmp_path):
    for checkpointing in (False, True):
        changes = {"gradient_checkpointing": checkpointing, "adam_epsilon": 1e-3}
        pipeline = train(base, photos, tmp_path / str(checkpointing), **changes)
        assert all(model.is_gradient_checkpointing == checkpointing for model in text_encoders(pipeline).values())
    expected, got = (weights_of(tmp_path / name) for name in ("False", "True"))
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, atol=2e-6, rtol=1e-4)


def test_in_half_precision_the_lora_is_not_rounded(base, photos, tmp_path):
    pipeline = train(base, photos, tmp_path, mixed_precision="bf16", validation_images=1, validation_steps=2)
    for model in text_encoders(pipeline).values():
        kinds = {".lora_" in name: weight.dtype for name, weight in model.named_parameters()}
        assert kinds == {True: torch.float32, False: torch.bfloat16}
    lora = safetensors.torch.load_file(tmp_path / LORA_WEIGHTS)
    assert {weight.dtype for weight in lora.values()} == {torch.float32}


def test_two_processes_train_as_one(base, photos, tmp_path):
    shared = {
        **WITHOUT_SEARCH,
        "train_text_encoder": True,
        "unfreeze_after": 0.3,
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # the usual one would divide rounding errors by themselves
    }
    train(base, photos, tmp_path / "one", train_batch_size=4, **shared)
    options = make_options(base, photos, tmp_path / "two", train_batch_size=2, **shared)
    launched = launch_forked(XL_SCRIPT if base.name.endswith("-xl") else SCRIPT, flags(options))
    assert (tmp_path / "two" / "README.md").exists(), launched.stderr
    expected, got = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert got.keys() == expected.keys() and any("text_encoder" in name for name in expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
