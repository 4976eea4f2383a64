"""Runs that are stopped or killed at any moment, and resumed, end as one that never was."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ForkedProgram, accelerate_launch, run_script

from diffusers_ctx.evaluation.grids import sample_rows
from diffusers_ctx.training.diffusion import validation
from diffusers_ctx.training.run.checkpoints import list_checkpoints
from diffusers_ctx.training.run.concept_checkpoint import PROGRESS_NAME
from diffusers_ctx.training.run.stop_signals import StopSignals

from .conftest import SCRIPT, create_trainer, flags, launcher_flags, load_trainer, make_options
from .test_training_script import weights_of


STEPS = 30


def options_of(base_model: Path, photos: Path, output_dir: Path) -> dict:
    return make_options(
        base_model,
        photos,
        output_dir,
        max_train_steps=STEPS,
        gradient_accumulation_steps=2,
        unfreeze_after=0.5,
        lr_scheduler="cosine",
        checkpointing_steps=4,
        checkpoints_total_limit=2,
        use_ema=True,
        cache_latents=True,
        cache_dir=str(output_dir.parent / "cache"),
        resume_from_checkpoint="latest",
    )


def start(options: dict) -> ForkedProgram:
    """The training script without the launcher, which would stand between the signal and the run."""
    return ForkedProgram(run_script, SCRIPT, flags(options))


def wait_for(condition: Callable[[], bool], process: ForkedProgram) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the run ended before it could be stopped"
        time.sleep(0.001)


@pytest.fixture(scope="module")
def undisturbed(base_model, photos, tmp_path_factory) -> dict[str, torch.Tensor]:
    output_dir = tmp_path_factory.mktemp("undisturbed") / "adapter"
    process = start(options_of(base_model, photos, output_dir))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return weights_of(output_dir)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(base_model, photos, undisturbed, tmp_path, number):
    options = options_of(base_model, photos, tmp_path / "adapter")
    process = start(options)
    wait_for(lambda: (tmp_path / "adapter" / "checkpoint-4").exists(), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    (step,) = re.findall(r"Stopped by a signal after step (\d+); go on with `--resume_from_checkpoint latest`", output)
    assert list_checkpoints(tmp_path / "adapter")[-1].name == f"checkpoint-{step}"
    assert not (tmp_path / "adapter" / "context_adapter.safetensors").exists()
    finish_and_compare(options, undisturbed, tmp_path / "adapter")


def test_a_signal_while_the_concepts_are_learned_saves_what_they_have_come_to(
    base_model, photos, undisturbed, tmp_path
):
    folder = tmp_path / "adapter"
    options = options_of(base_model, photos, folder)
    process = start(options)
    wait_for((folder / PROGRESS_NAME).exists, process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped by a signal while the concepts were learned; go on with" in output
    assert errors.count(f"The run (process {process.pid}) will stop when it has saved its progress") == 1
    assert f"`kill -INT {process.pid}` where a launcher has ended, stops it at once" in errors
    assert not list_checkpoints(folder)
    with pytest.raises(ValueError, match=re.escape(PROGRESS_NAME)):
        load_trainer(options | {"resume_from_checkpoint": None})
    with pytest.raises(ValueError, match="`seed` was 0 and is 1"):
        load_trainer(options | {"seed": 1})
    finish_and_compare(options, undisturbed, folder)


def test_a_signal_cuts_a_grid_short(options, monkeypatch):
    drawn = []

    def sample(pipeline, contexts, *arguments, **keywords) -> list[np.ndarray]:
        drawn.extend(contexts)
        os.kill(os.getpid(), signal.SIGTERM)
        return sample_rows(pipeline, contexts, *arguments, **keywords)

    monkeypatch.setattr(validation, "sample_rows", sample)
    shown = {"validation_prompt": "a street", "num_validation_images": 1, "validation_steps": 2}
    trainer = create_trainer(options | shown | {"max_train_steps": 9})
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + signal.SIGTERM and len(drawn) == 1  # of three rows
    assert not (trainer.output_dir / "validation").exists()
    assert list_checkpoints(trainer.output_dir)[-1].name == "checkpoint-3"  # of the next step, which is asked after


@pytest.mark.parametrize(
    "moment",
    [
        "while a checkpoint is written",
        "between two",
        "after the concepts are learned",
        "while they are learned",
        "before anything",
    ],
)
def test_a_killed_run_goes_on(base_model, photos, undisturbed, tmp_path, moment):
    folder = tmp_path / "adapter"
    process = start(options_of(base_model, photos, folder))
    if moment == "while a checkpoint is written":
        wait_for(lambda: (folder / "unfinished-checkpoint-12").exists(), process)
    elif moment == "between two":
        wait_for(lambda: (folder / "checkpoint-12").exists(), process)
        time.sleep(0.1)
    elif moment == "after the concepts are learned":
        wait_for((folder / "checkpoint-0").exists, process)
    elif moment == "while they are learned":
        wait_for((folder / PROGRESS_NAME).exists, process)
    else:
        wait_for(folder.exists, process)
    process.kill()
    process.wait()
    if moment == "after the concepts are learned":
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-0"]
    finish_and_compare(options_of(base_model, photos, folder), undisturbed, folder)


def finish_and_compare(options: dict, undisturbed: dict[str, torch.Tensor], folder: Path) -> None:
    process = start(options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    got = weights_of(folder)
    assert got.keys() == undisturbed.keys()
    assert not [name for name in got if not torch.equal(got[name], undisturbed[name])]
    assert len(list_checkpoints(folder)) == 2 and not list(folder.glob("unfinished-*"))
    assert not (folder / PROGRESS_NAME).exists()


# what all processes agree on


class Gathering:
    """An accelerator in whose `gather` another process was asked to stop, or a signal arrives."""

    device = torch.device("cpu")
    is_main_process = True

    def __init__(self, other: int = 0, signal_meanwhile: int | None = None):
        self.other, self.signal_meanwhile = other, signal_meanwhile

    def gather(self, received: torch.Tensor) -> torch.Tensor:
        gathered = torch.cat([received, torch.tensor([self.other])])
        if self.signal_meanwhile:
            os.kill(os.getpid(), self.signal_meanwhile)
            self.signal_meanwhile = None
        return gathered


def test_a_process_stops_when_another_was_asked_to():
    with StopSignals(Gathering(other=signal.SIGTERM)) as stop:
        assert stop.requested() and stop.exit_code == 143


def test_a_signal_that_comes_while_processes_agree_counts_in_the_next_step():
    with StopSignals(Gathering(signal_meanwhile=signal.SIGTERM)) as stop:
        assert not stop.requested()  # as the other processes know it
        assert stop.requested() and stop.exit_code == 143


@pytest.fixture
def as_in_the_foreground():
    """Processes that a shell starts in the background inherit that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_in_the_foreground")
def test_a_second_sigterm_is_waited_with_and_a_second_sigint_is_not():
    with StopSignals(Gathering()) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_in_other_threads_nothing_is_caught():
    def train() -> None:
        with StopSignals(Gathering()) as stop:
            answers.append(stop.requested())

    answers: list[bool] = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert answers == [False]


def start_two(options: dict) -> ForkedProgram:
    return ForkedProgram(accelerate_launch, [*launcher_flags(2), SCRIPT, *flags(options)])


def test_two_processes_stop_after_the_same_step(base_model, photos, tmp_path):
    options = options_of(base_model, photos, tmp_path / "adapter") | {
        "train_batch_size": 2,
        "max_train_steps": 400,
    }
    process = start_two(options)
    wait_for((tmp_path / "adapter" / "checkpoint-4").exists, process)
    process.terminate()  # the launcher passes it on
    output, _ = process.communicate(timeout=120)
    (step,) = re.findall(r"Stopped by a signal after step (\d+)", output)
    last = list_checkpoints(tmp_path / "adapter")[-1]
    assert last.name == f"checkpoint-{step}" and (last / "trained.safetensors").exists()
    assert len(list(last.glob("random_states_*"))) == 2


def test_two_processes_stop_while_the_concepts_are_learned_and_go_on(base_model, photos, undisturbed, tmp_path):
    folder = tmp_path / "adapter"
    options = options_of(base_model, photos, folder) | {"train_batch_size": 2}
    process = start_two(options)
    wait_for((folder / PROGRESS_NAME).exists, process)
    process.terminate()  # the launcher passes it on
    output, _ = process.communicate(timeout=120)
    assert output.count("Stopped by a signal while the concepts were learned") == 1 and not list_checkpoints(folder)
    process = start_two(options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    torch.testing.assert_close(weights_of(folder), undisturbed, atol=1e-4, rtol=0)
