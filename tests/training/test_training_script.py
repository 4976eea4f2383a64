"""The training script as users run it, through `accelerate launch`: a few runs of seconds that many tests look at."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import StableDiffusionPipeline
from hub.hub_double import TOKEN, USER, client_environment, run_client
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.training import parse_training_config

from .conftest import SCRIPT, create_trainer, files_in, flags, launch_script, make_options, run_forked


REPO = f"{USER}/weather"
ADAPTER_WEIGHTS = (
    "context_adapter.safetensors",
    "context_module/diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
)
SAMPLE = """
import sys
import numpy as np
import torch
from diffusers_ctx import ComposablePipeline

base, adapter, target = sys.argv[1:]
pipeline = ComposablePipeline.from_pretrained(base, safety_checker=None)
plain = pipeline("a street", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
pipeline.load_context_adapter(adapter)
composed = pipeline(
    "a street",
    interventions=["night", "snow"],
    num_inference_steps=2,
    generator=torch.manual_seed(0),
    output_type="np",
).images
np.savez(target, plain=plain, composed=composed)
"""


def weights_of(folder: Path, names=ADAPTER_WEIGHTS) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": weight for name in names for key, weight in safetensors.torch.load_file(folder / name).items()
    }


# one run, in every way of a user: text, validation, TensorBoard, checkpoints, and to the Hub


@pytest.fixture(scope="session")
def run(base_model, photos, hub, tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("run")
    output_dir = root / "weather"
    options = make_options(
        base_model,
        photos,
        output_dir,
        mode="lora",
        unfreeze_after=0.6,  # after the checkpoint at step 3
        max_train_steps=6,
        gradient_accumulation_steps=2,  # an epoch has 5 batches, so step 3 begins with the last one of the first
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        random_flip=True,
        noise_offset=0.1,
        snr_gamma=5.0,
        use_ema=True,
        proportion_empty_prompts=0.3,
        checkpointing_steps=3,
        validation_prompt="a street",
        validation_interventions=["night+snow"],
        validation_steps=3,
        num_validation_images=2,
        report_to="tensorboard",
    )
    environment = client_environment(hub.endpoint, root, HF_TOKEN=TOKEN)
    launched = launch_script(SCRIPT, flags(options | {"push_to_hub": True}), environment=environment)
    return SimpleNamespace(options=options, output_dir=output_dir, log=launched.stderr)


@pytest.fixture(scope="session")
def sampled(run, base_model, hub, tmp_path_factory) -> dict[str, np.ndarray]:
    """Images of the adapter on the Hub, loaded into an empty cache in a new process."""
    home = tmp_path_factory.mktemp("new-home")
    client = run_client(SAMPLE, base_model, REPO, home / "images.npz", endpoint=hub.endpoint, hf_home=home)
    assert client.returncode == 0, client.stderr
    return dict(np.load(home / "images.npz"))


def test_a_run_leaves_its_adapter_checkpoints_log_and_grids(run):
    assert {path.name for path in run.output_dir.iterdir()} == {
        "README.md",
        "checkpoint-0",
        "checkpoint-3",
        "checkpoint-6",
        "context_adapter.safetensors",
        "context_adapter_config.json",
        "context_module",
        "logs",
        "pytorch_lora_weights.safetensors",
        "training_config.json",
        "validation",
    }
    assert json.loads((run.output_dir / "context_adapter_config.json").read_text())["concepts"] == ["night", "snow"]
    assert "should be kept in float32" not in run.log


def test_validation_grids_have_a_row_per_context_and_composition(run):
    grids = [Image.open(run.output_dir / "validation" / f"step-{step}.png") for step in (3, 6)]
    rows = ["obs", "night", "snow", "night+snow"]
    assert {grid.size for grid in grids} == {(2 * 32, len(rows) * (32 + 14))}
    assert np.asarray(grids[0]).std() > 10 and grids[0].tobytes() != grids[1].tobytes()


def test_trackers_hold_every_step_and_the_grids(run):
    (events,) = (run.output_dir / "logs" / "context-adapter").glob("events.*")
    tracked = EventAccumulator(str(events)).Reload()
    losses = tracked.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4, 5, 6]
    assert all(0 < event.value < 10 for event in losses)
    rates = [event.value for event in tracked.Scalars("lr")]
    # after each step: two of warm-up, then a half cosine over the other four
    np.testing.assert_allclose(rates, [0.5e-2, *(0.5e-2 * (1 + np.cos(np.pi * k / 4)) for k in range(5))], atol=1e-8)
    assert {"concepts/kl/night", "concepts/kl/snow", "concepts/kl/hidden_0"} <= set(tracked.Tags()["scalars"])
    assert [event.step for event in tracked.Images("validation")] == [3, 6]
    assert tracked.Images("validation")[0].width == 64


def test_the_record_of_the_run_is_true_and_runs_again(run):
    card = (run.output_dir / "README.md").read_text()
    assert "accelerate launch .../train_context_text_to_image.py --pretrained_model_name_or_path" in card
    assert "| steps | `6` |" in card and "| batch size | `8` |" in card and "| images | `18` |" in card
    assert "| resolution | `32` |" in card
    assert f"# {REPO}\n" in card and f'pipe.load_context_adapter("{REPO}")' in card
    record = run.output_dir / "training_config.json"
    defaults = {"posterior_encoder": "unet", "injection": "cross_attention"}  # for this base
    given = parse_training_config(flags(run.options | {"push_to_hub": True} | defaults))
    assert parse_training_config([str(record)]) == given
    assert "hub_token" not in json.loads(record.read_text()) and TOKEN not in card


def test_the_push_is_the_adapter_and_nothing_else(run, hub):
    pushed = hub.repos[REPO].branches["main"][-1].files
    names = {"README.md", "context_adapter_config.json", "context_module/config.json", *ADAPTER_WEIGHTS}
    assert pushed.keys() == names | {".gitattributes"}
    on_disk = files_in(run.output_dir)
    assert all(pushed[name] == on_disk[name] for name in names)


def test_the_adapter_of_the_hub_samples_in_a_new_process(run, sampled, base_model):
    pipeline = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    pipeline.load_context_adapter(run.output_dir)
    expected = pipeline(
        "a street",
        interventions=["night", "snow"],
        num_inference_steps=2,
        generator=torch.manual_seed(0),
        output_type="np",
    ).images
    assert sampled["composed"].shape == (1, 32, 32, 3) and np.isfinite(sampled["composed"]).all()
    np.testing.assert_allclose(sampled["composed"], expected, atol=1e-4)
    assert np.abs(sampled["composed"] - sampled["plain"]).max() > 1e-3


# stopped and resumed, with a YAML file in the place of flags


@pytest.fixture(scope="session")
def resumed(run, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resumed")
    output_dir = root / "weather"
    output_dir.mkdir()
    shutil.copytree(run.output_dir / "checkpoint-3", output_dir / "checkpoint-3")
    (output_dir / "unfinished-checkpoint-5").mkdir()
    changes = {"output_dir": str(output_dir), "resume_from_checkpoint": "latest", "dataloader_num_workers": 2}
    (root / "options.yaml").write_text(yaml.safe_dump(run.options | changes))
    run_forked(SCRIPT, [root / "options.yaml"])
    return output_dir


def test_resuming_is_never_having_stopped(run, resumed):
    expected, got = weights_of(run.output_dir), weights_of(resumed)
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different
    grids = [(folder / "validation" / "step-6.png").read_bytes() for folder in (run.output_dir, resumed)]
    assert grids[0] == grids[1]


def test_and_there_was_something_left_to_learn(run, resumed):
    halfway, finished = (weights_of(run.output_dir / f"checkpoint-{step}", ["trained.safetensors"]) for step in (3, 6))
    learned = [name for name in halfway if not torch.equal(halfway[name], finished[name])]
    assert any("lora_A" in name for name in learned) and any("read_out" in name for name in learned)
    assert not (resumed / "validation" / "step-3.png").exists()


# two processes, mode full and a dataset of the datasets library, held against one process and folders


@pytest.fixture(scope="session")
def one_and_two(base_model, photos, parquet, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("processes")
    shared = {
        "mode": "full",
        "unfreeze_after": 0.3,
        "max_train_steps": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler": "linear",
        "adam_epsilon": 1e-3,  # the usual one would divide rounding errors by themselves
        "random_flip": True,
        "noise_offset": 0.1,
        "cache_dir": str(root / "cache"),
    }
    create_trainer(make_options(base_model, photos, root / "one", train_batch_size=4, **shared)).train()
    options = make_options(base_model, None, root / "two", dataset_name=str(parquet), train_batch_size=2, **shared)
    launch_script(SCRIPT, flags(options), num_processes=2)
    return root / "one", root / "two"


def test_two_processes_train_as_one(one_and_two):
    one, two = one_and_two
    for folder, processes in ((one, 1), (two, 2)):
        assert f"{processes} x cpu" in (folder / "README.md").read_text()
    names = [*ADAPTER_WEIGHTS[:2], "unet/diffusion_pytorch_model.safetensors"]
    expected, got = weights_of(one, names), weights_of(two, names)
    assert expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_full_saves_a_pipeline_that_learned_and_that_stock_diffusers_loads(one_and_two, base_model):
    folder, _ = one_and_two
    folders = (folder, base_model)
    trained, base = (StableDiffusionPipeline.from_pretrained(path, safety_checker=None) for path in folders)
    states = [pipeline.unet.state_dict() for pipeline in (trained, base)]
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert len(different) == len(states[0])
    for part in ("vae", "text_encoder"):
        before, after = (getattr(pipeline, part).state_dict() for pipeline in (base, trained))
        assert all(torch.equal(before[name], after[name]) for name in before)

    composable = ComposablePipeline.from_pretrained(folder, safety_checker=None)
    composable.load_context_adapter(folder)
    assert composable.concepts == ["night", "snow"]
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    assert re.search(r"from_pretrained\(\"path/to/this/folder\"\)", (folder / "README.md").read_text())
