"""Training on a GPU: each precision and option that a GPU treats in its own way, held against the CPU if possible."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.conftest import SCRIPT, SCRIPTS, flags, make_options
from training.test_posterior_encoders import clip  # noqa: F401 (a fixture)
from training.test_training_script import weights_of

from diffusers_ctx import ComposablePipeline, ComposableXLPipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config

from .conftest import SMOOTH


LEARNS_AT_ONCE = {"unfreeze_after": 0.0, "max_train_steps": 4}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def has_learned(folder: Path) -> bool:
    """Values of the tokens start at zero. The gradient scaler leaves a step out, but not all of them."""
    weights = load_file(folder / "context_adapter.safetensors")
    values = [weight for name, weight in weights.items() if "value" in name]
    return bool(values) and all(weight.isfinite().all() and weight.any() for weight in values)


def assert_samples_alike(base: Path, adapter: Path) -> None:
    """On GPU and CPU, whatever the precision that it was trained in."""
    images = {}
    for device in ("cpu", "cuda"):
        pipeline = ComposablePipeline.from_pretrained(base, safety_checker=None).to(device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_context_adapter(adapter)
        output = pipeline(
            "a street",
            interventions=["night", "snow"],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        images[device] = output.images
    assert np.isfinite(images["cuda"]).all()
    np.testing.assert_allclose(images["cuda"], images["cpu"], atol=5e-3)


# what runs on a GPU


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"mixed_precision": "fp16", "max_train_steps": 6}, id="fp16"),
        pytest.param({"mixed_precision": "bf16"}, id="bf16"),
        pytest.param({"mixed_precision": "no", "allow_tf32": True}, id="tf32"),
        pytest.param({"mixed_precision": "bf16", "mode": "frozen"}, id="frozen"),
        pytest.param({"mixed_precision": "bf16", "mode": "full"}, id="full-bf16"),
        pytest.param({"mixed_precision": "fp16", "mode": "full", "max_train_steps": 6}, id="full-fp16"),
        pytest.param({"mixed_precision": "fp16", "train_text_encoder": True, "max_train_steps": 6}, id="text-fp16"),
        pytest.param(
            {"mixed_precision": "bf16", "train_text_encoder": True, "gradient_checkpointing": True},
            id="text-checkpointing",
        ),
        pytest.param({"mixed_precision": "bf16", "unfreeze_after": 0.5, "random_flip": True}, id="unfreezing"),
        pytest.param({"optimizer": "adamw_8bit"}, id="adamw-8bit", marks=needs("bitsandbytes")),
        pytest.param({"optimizer": "prodigy", "learning_rate": 1.0}, id="prodigy", marks=needs("prodigyopt")),
        pytest.param(
            {"enable_xformers_memory_efficient_attention": True, "mixed_precision": "fp16", "max_train_steps": 6},
            id="xformers",
            marks=needs("xformers"),
        ),
        pytest.param({"mixed_precision": "bf16", "posterior_encoder": "unet", "cache_latents": True}, id="unet"),
        pytest.param({"mixed_precision": "fp16", "posterior_encoder": "clip", "cache_latents": True}, id="clip"),
        pytest.param(
            {"mixed_precision": "bf16", "causal_form": "reduced_form", "posterior_type": "amortized"}, id="amortized"
        ),
        pytest.param({"mixed_precision": "bf16", "streaming": True}, id="streaming"),
        pytest.param(
            {"mixed_precision": "bf16", "snr_gamma": 5.0, "noise_offset": 0.1, "use_ema": True}, id="average"
        ),
    ],
)
def test_it_trains_and_what_it_learned_samples_alike_everywhere(
    options,
    trainer_on,
    base_model,
    clip,  # noqa: F811
    tmp_path,
    changes,
):
    package = {"adamw_8bit": "bitsandbytes"}.get(changes.get("optimizer", ""))
    if "enable_xformers_memory_efficient_attention" in changes:
        package = "xformers.ops"
    if package is not None:  # it may be there and not fit this PyTorch
        pytest.importorskip(package, exc_type=ImportError)
    if changes.get("posterior_encoder") == "clip":
        changes = changes | {"posterior_encoder_model": str(clip)}
    given = options(**LEARNS_AT_ONCE | {"cache_dir": str(tmp_path / "cache")} | changes)
    trainer = trainer_on("cuda", given)
    losses = record_losses(trainer)
    adapter = trainer.train()
    assert np.isfinite(losses).all() and len(losses) == given["max_train_steps"]
    assert has_learned(adapter)
    if changes.get("mixed_precision") == "fp16":
        assert trainer.accelerator.scaler is not None
    assert_samples_alike(adapter if changes.get("mode") == "full" else base_model, adapter)


def record_losses(trainer: ContextTrainer) -> list[float]:
    """The losses of a run, as it comes to them."""
    losses: list[float] = []
    train_on = trainer._train_on

    def recorded(*args) -> float:
        losses.append(train_on(*args))
        return losses[-1]

    trainer._train_on = recorded  # type: ignore[method-assign]
    return losses


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_it_validates_and_reports(options, trainer_on, precision):
    validation = {"validation_prompt": "a street", "validation_steps": 2, "num_validation_images": 2}
    changes = {"mixed_precision": precision, "validation_images": 2, "use_ema": True, "report_to": "tensorboard"}
    adapter = trainer_on("cuda", options(**LEARNS_AT_ONCE, **validation, **changes)).train()
    assert {path.name for path in (adapter / "validation").iterdir()} == {"step-2.png", "step-4.png"}
    assert "1 x cuda" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_stable_diffusion_xl_trains(xl_base_model, photos, tmp_path, precision):
    given = make_options(xl_base_model, photos, tmp_path, **LEARNS_AT_ONCE, mixed_precision=precision)
    given |= {"train_text_encoder": True, "validation_prompt": "a street", "validation_steps": 4}
    trainer = ContextTrainer(parse_training_config(flags(given)), ComposableXLPipeline.from_pretrained(xl_base_model))
    assert has_learned(trainer.train())


# held against another run


@pytest.mark.parametrize(("precision", "atol"), [("no", 1e-4), ("fp16", 1e-3), ("bf16", 1e-3)])
def test_resuming_is_never_having_stopped(options, trainer_on, tmp_path, precision, atol):
    shared = {"max_train_steps": 4, "unfreeze_after": 0.5, "checkpointing_steps": 2, "mixed_precision": precision}
    given = options(**shared, **SMOOTH, use_ema=True, ema_decay=0.6)
    expected = trainer_on("cuda", given).train()
    shutil.copytree(expected / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    changes = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    got = trainer_on("cuda", given | changes).train()
    assert_close(weights_of(got), weights_of(expected), atol)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_that_goes_on_from_the_cpu_learns_what_it_would_have_learned_there(options, trainer_on, tmp_path, mode):
    """From one checkpoint, with the same noise: what learned before it is the same on both."""
    given = options(
        mode=mode, max_train_steps=4, unfreeze_after=0.5, checkpointing_steps=1, random_flip=True, **SMOOTH
    )
    expected = trainer_on("cpu", given).train()
    shutil.copytree(expected / "checkpoint-1", tmp_path / "gpu" / "checkpoint-1")
    changes = {"output_dir": str(tmp_path / "gpu"), "resume_from_checkpoint": "latest"}
    trainer = trainer_on("cuda", given | changes)
    got = trainer.train()
    names = {"context_adapter.safetensors"}
    names |= {"unet/diffusion_pytorch_model.safetensors" if mode == "full" else "pytorch_lora_weights.safetensors"}
    before = load_file(expected / "checkpoint-1" / "trained.safetensors")
    after = load_file(expected / "checkpoint-4" / "trained.safetensors")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved > 5e-4  # ten times what they may differ by
    assert_close(weights_of(got, sorted(names)), weights_of(expected, sorted(names)), atol=5e-5)


@pytest.mark.parametrize("posterior_type", ["inverse", "amortized"])
def test_concepts_are_learned_as_on_the_cpu(options, trainer_on, posterior_type):
    figures = []
    for device in ("cpu", "cuda"):
        given = options(device, posterior_type=posterior_type, concept_steps=30, concept_batch_size=18)
        figures.append(trainer_on(device, given)._learn_concepts())
    assert all(np.isfinite(list(figures[1].values())))
    assert figures[1] == pytest.approx(figures[0], rel=0.02, abs=2e-3)


# in processes of their own


def accelerate_launch(environment: dict[str, str], script: Path, options: dict, *launcher: str) -> None:
    """`accelerate launch` with these flags of its own."""
    program = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", *launcher]
    run = subprocess.run(
        [*program, str(script), *flags(options)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize(
    ("config_file", "changes"),
    [
        ("ddp.yaml", {"train_text_encoder": True}),
        ("fsdp2.yaml", {}),
        ("fsdp2.yaml", {"mode": "full", "gradient_checkpointing": True}),
    ],
)
def test_the_configurations_for_several_gpus_train_on_one(options, environment, base_model, config_file, changes):
    """In bf16, and with a backbone that learns later than the adapter."""
    given = options(max_train_steps=4, unfreeze_after=0.5, checkpointing_steps=2, **changes)
    config = SCRIPTS / "configs" / config_file
    accelerate_launch(environment, SCRIPT, given, f"--config_file={config}", "--main_process_port=0")
    adapter = Path(given["output_dir"])
    assert has_learned(adapter)
    assert json.loads((adapter / "training_config.json").read_text())["max_train_steps"] == 4
    assert (adapter / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir() == (config_file == "fsdp2.yaml")
    assert_samples_alike(adapter if changes.get("mode") == "full" else base_model, adapter)


def test_compiled_training_runs(options, environment):
    given = options(**LEARNS_AT_ONCE | {"max_train_steps": 2})
    launcher = ["--num_machines=1", "--mixed_precision=bf16", "--dynamo_backend=inductor"]
    accelerate_launch(environment, SCRIPT, given, *launcher)
    assert has_learned(Path(given["output_dir"]))
