"""Training on a GPU: each precision and option that a GPU treats in its own way, held against the CPU if possible."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.conftest import SCRIPT, SCRIPTS, encoded_trainer, flags, make_options
from training.test_posterior_encoders import clip  # noqa: F401 (a fixture)
from training.test_training_script import weights_of

from diffusers_ctx import ComposablePipeline, ComposableXLPipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config
from diffusers_ctx.training.concepts.stage import ConceptStage
from diffusers_ctx.training.diffusion.stage import DiffusionStage

from .conftest import SMOOTH


LEARNS_AT_ONCE = {"unfreeze_after": 0.0, "max_train_steps": 4}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


def assert_close(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float, rtol: float = 1e-3
) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def assert_learned(folder: Path, at_least: float = 5e-3) -> None:
    """Values of the tokens, and `lora_B`, start at zero: a step of Adam moves each by up to the learning rate, 1e-2.

    The gradient scaler leaves out a step, but not all of them.
    """
    weights = load_file(folder / "context_adapter.safetensors")
    values = {name: weight for name, weight in weights.items() if "value" in name}
    assert values
    for name, weight in values.items():
        assert weight.isfinite().all() and weight.abs().max() > at_least, name
    if (folder / "pytorch_lora_weights.safetensors").exists():
        lora = [w for name, w in load_file(folder / "pytorch_lora_weights.safetensors").items() if "lora_B" in name]
        assert all(weight.isfinite().all() for weight in lora)
        # the last layer of the first text encoder of Stable Diffusion XL has no part in the loss
        assert max(weight.abs().max() for weight in lora) > at_least


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
    monkeypatch,
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
    losses = record_losses(monkeypatch)
    adapter = trainer.train()
    assert np.isfinite(losses).all() and len(losses) == given["max_train_steps"]
    # the first steps of Prodigy, which finds its rate, are tiny
    assert_learned(adapter, at_least=0.0 if changes.get("optimizer") == "prodigy" else 5e-3)
    if changes.get("mixed_precision") == "fp16":
        assert trainer.accelerator.scaler is not None
    assert_samples_alike(adapter if changes.get("mode") == "full" else base_model, adapter)


def record_losses(monkeypatch) -> list[float]:
    """The losses of all optimizer steps from here on."""
    losses: list[float] = []
    steps = DiffusionStage.steps

    def recorded(stage: DiffusionStage) -> Iterator[dict[str, float]]:
        for metrics in steps(stage):
            losses.append(metrics["loss"])
            yield metrics

    monkeypatch.setattr(DiffusionStage, "steps", recorded)
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
    assert_learned(trainer.train())


# held against another run


def moved_between(folder: Path, first: int, last: int) -> float:
    """How far the learned weight that moved most went between two checkpoints."""
    before, after = (load_file(folder / f"checkpoint-{step}" / "trained.safetensors") for step in (first, last))
    return max(float((after[name] - before[name]).abs().max()) for name in before)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_resuming_is_never_having_stopped(options, trainer_on, tmp_path, precision):
    """A step that is skipped or taken twice, and moments that are lost, change weights by much of a step.

    Two steps come after the checkpoint, and the average holds 0.4 of the last one: a tenth of a step is well below
    what any of these leaves behind, and far above the rounding of sums that a GPU adds in another order.
    """
    shared = {"max_train_steps": 8, "unfreeze_after": 0.5, "checkpointing_steps": 2, "mixed_precision": precision}
    given = options(**shared, **SMOOTH, use_ema=True, ema_decay=0.6)
    expected = trainer_on("cuda", given).train()
    shutil.copytree(expected / "checkpoint-6", tmp_path / "resumed" / "checkpoint-6")
    changes = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    got = trainer_on("cuda", given | changes).train()
    step = moved_between(expected, 6, 8) / 2
    assert step > 1e-4  # the gradient scaler left out neither of the two
    assert_close(weights_of(got), weights_of(expected), atol=step / 10, rtol=0)


@pytest.mark.parametrize(
    ("kind", "mode"), [(ComposablePipeline, "lora"), (ComposablePipeline, "full"), (ComposableXLPipeline, "lora")]
)
def test_a_run_that_goes_on_from_the_cpu_learns_what_it_would_have_learned_there(
    options,
    trainer_on,
    xl_base_model,
    tmp_path,
    kind,
    mode,
):
    """From one checkpoint, with the same noise: what learned before it is the same on both."""
    given = options(
        mode=mode, max_train_steps=4, unfreeze_after=0.5, checkpointing_steps=1, random_flip=True, **SMOOTH
    )
    if kind is ComposableXLPipeline:
        given |= {"pretrained_model_name_or_path": str(xl_base_model), "train_text_encoder": True}
    expected = trainer_on("cpu", given, kind).train()
    shutil.copytree(expected / "checkpoint-1", tmp_path / "gpu" / "checkpoint-1")
    changes = {"output_dir": str(tmp_path / "gpu"), "resume_from_checkpoint": "latest"}
    got = trainer_on("cuda", given | changes, kind).train()
    names = {"context_adapter.safetensors"}
    names |= {"unet/diffusion_pytorch_model.safetensors" if mode == "full" else "pytorch_lora_weights.safetensors"}
    assert moved_between(expected, 1, 4) > 5e-4  # ten times what they may differ by
    assert_close(weights_of(got, sorted(names)), weights_of(expected, sorted(names)), atol=5e-5)


@pytest.mark.parametrize("posterior_type", ["inverse", "amortized"])
def test_concepts_are_learned_as_on_the_cpu(options, trainer_on, posterior_type):
    metrics = []
    for device in ("cpu", "cuda"):
        given = options(device, posterior_type=posterior_type, concept_steps=30, concept_batch_size=18)
        trainer = encoded_trainer(trainer_on(device, given))
        context = trainer.config.context
        stage = ConceptStage(trainer.accelerator, trainer.context_module, trainer.latents, context, seed=0)
        metrics.append(stage.run())
    assert all(np.isfinite(list(metrics[1].values())))
    assert metrics[1] == pytest.approx(metrics[0], rel=0.02, abs=2e-3)


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
    assert_learned(adapter)
    assert json.loads((adapter / "training_config.json").read_text())["max_train_steps"] == 4
    assert (adapter / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir() == (config_file == "fsdp2.yaml")
    assert_samples_alike(adapter if changes.get("mode") == "full" else base_model, adapter)


def test_compiled_training_runs(options, environment):
    given = options(**LEARNS_AT_ONCE | {"max_train_steps": 2})
    launcher = ["--num_machines=1", "--mixed_precision=bf16", "--dynamo_backend=inductor"]
    accelerate_launch(environment, SCRIPT, given, *launcher)
    assert_learned(Path(given["output_dir"]))
