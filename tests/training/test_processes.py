"""Training in several processes: with a last batch that does not go round, and with one that fails.

Real `accelerate launch`es of two processes on the CPU, with the configuration of `train_scripts/configs/`.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .conftest import SCRIPT, SCRIPTS, accelerate_launch, create_trainer, flags, make_options
from .test_training_script import weights_of


TRAIN = f"""
import runpy
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
FAILING = """
import os, signal
from diffusers_ctx.training.trainer import ContextTrainer

train_on = ContextTrainer._train_on


def fail(self, number, batch, step):
    if step == 1 and self.accelerator.process_index == 1:
        {what}
    return train_on(self, number, batch, step)


ContextTrainer._train_on = fail
"""


def launch(folder: Path, program: str, options: dict) -> subprocess.CompletedProcess[str]:
    """Trains in two processes, in float32; a program that hangs fails the test."""
    script = folder / "program.py"
    script.write_text(program)
    launcher = ["--config_file", SCRIPTS / "configs" / "ddp.yaml", "--num_processes=2", "--main_process_port=0"]
    launcher += ["--mixed_precision=no", "--num_cpu_threads_per_process=1"]
    return accelerate_launch(launcher, script, flags(options), timeout=180)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_last_batch_for_one_process_alone_is_left_out(base_model, photos, tmp_path):
    # 21 rows an epoch: five batches of four, of which each process takes two
    shared = {"max_train_steps": 5, "learning_rate": 1e-3, "adam_epsilon": 1e-3, "unfreeze_after": 0.0}
    create_trainer(make_options(base_model, photos, tmp_path / "one", train_batch_size=8, **shared)).train()
    launch(tmp_path, TRAIN, make_options(base_model, photos, tmp_path / "two", train_batch_size=4, **shared))
    assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("raise RuntimeError('this process is out of memory')", "RuntimeError: this process is out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
        (
            "self.objective.register_forward_hook(lambda *_: _[-1] * float('nan'))",
            "FloatingPointError: The loss is nan",
        ),
    ],
)
def test_a_process_that_fails_ends_the_run(options, tmp_path, what, error):
    changes = {"train_batch_size": 2, "max_train_steps": 500, "checkpointing_steps": 1}
    launched = launch(tmp_path, FAILING.format(what=what) + TRAIN, options | changes)
    assert launched.returncode != 0 and error in launched.stderr
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["checkpoint-1"]


def test_an_image_that_cannot_be_read_ends_the_run(options, photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "snow" / "3.png").write_bytes(b"no image")
    launched = launch(tmp_path, TRAIN, options | {"train_data_dir": str(root), "train_batch_size": 2})
    assert launched.returncode != 0 and "ValueError: 1 of 18 images cannot be read" in launched.stderr
