"""Checkpoints on disk: whole or not there, pruned, and found again."""

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from diffusers_ctx.training.run.checkpoints import (
    checkpoint_step,
    choose_checkpoint,
    find_checkpoint,
    list_checkpoints,
    register_trained_weights,
    save_checkpoint,
)
from diffusers_ctx.training.run.concept_checkpoint import ConceptCheckpoint
from diffusers_ctx.training.run.stop_signals import StopSignals

from .conftest import files_in


OPTIONS = {"seed": 0, "images": {"night": 5}}


class Model(nn.Module):
    def __init__(self, rank: int = 2):
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.learning = nn.Linear(2, rank)
        self.inner = nn.Module()
        self.inner.context_module = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):
        return self.learning(self.inner.context_module(self.frozen(x)))


def start(model: nn.Module) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, torch.optim.AdamW(model.learning.parameters()))
    register_trained_weights(accelerator)
    return accelerator


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def accelerator(model) -> Accelerator:
    return start(model)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_learns_and_the_context_module_are_saved_and_come_back(accelerator, model, tmp_path):
    checkpoint = save_checkpoint(accelerator, tmp_path, 3, OPTIONS, total_limit=None)
    assert checkpoint == tmp_path / "checkpoint-3" and checkpoint_step(checkpoint) == 3
    saved = safetensors.torch.load_file(checkpoint / "trained.safetensors")
    expected = {name: weight.clone() for name, weight in model.state_dict().items() if not name.startswith("frozen")}
    assert saved.keys() == expected.keys() and len(saved) == 4
    assert "trained.safetensors" in names(checkpoint) and "model.safetensors" not in names(checkpoint)

    for parameter in model.parameters():
        parameter.data += 1
    frozen = model.frozen.weight.clone()
    accelerator.load_state(str(checkpoint))
    for name, weight in expected.items():
        assert torch.equal(model.state_dict()[name], weight)
    assert torch.equal(model.frozen.weight, frozen)


def test_a_checkpoint_of_other_parameters_is_refused(accelerator, tmp_path):
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    other = Model()
    other.learning.bias.requires_grad_(False)
    before = {name: weight.clone() for name, weight in other.state_dict().items()}
    with pytest.raises(ValueError, match="resume with the options that it was made with"):
        start(other).load_state(str(checkpoint))
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in before.items())


def die(*arguments, **keywords):
    raise KeyboardInterrupt


def test_one_that_was_being_written_is_never_taken_for_a_checkpoint(accelerator, model, tmp_path):
    first = save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    before = files_in(first)
    hook = accelerator.register_save_state_pre_hook(die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, 2, OPTIONS, total_limit=1)
    hook.remove()
    assert (tmp_path / "unfinished-checkpoint-2" / "trained.safetensors").is_file()  # it died half-way
    assert list_checkpoints(tmp_path) == [first] and find_checkpoint(tmp_path, "latest") == first
    with pytest.raises(FileNotFoundError):
        find_checkpoint(tmp_path, "unfinished-checkpoint-2")
    assert files_in(first) == before

    save_checkpoint(accelerator, tmp_path, 2, OPTIONS, total_limit=None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]  # and what lay half-written is gone


@pytest.mark.parametrize(
    ("size", "options", "cause"),
    [
        (64, OPTIONS, SafetensorError),  # of the weights
        (1_000, OPTIONS, RuntimeError),  # of torch.save
        (100_000, {"images": "many" * 100_000}, OSError),
    ],
)
def test_a_full_disk_leaves_the_last_one_and_says_so(accelerator, model, tmp_path, largest_file, size, options, cause):
    first = save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=1)
    before = files_in(first)
    largest_file(size)
    message = r"checkpoint-2 could not be written \(.*then go on from checkpoint-1 with `--resume_from_checkpoint"
    with pytest.raises(OSError, match=message) as raised:
        save_checkpoint(accelerator, tmp_path, 2, options, total_limit=1)
    assert type(raised.value.__cause__) is cause
    assert names(tmp_path) == ["checkpoint-1"] and files_in(first) == before


def test_one_is_on_the_disk_before_it_has_its_name(accelerator, tmp_path, monkeypatch):
    on_disk = set()

    def fsync(handle: int) -> None:
        on_disk.add(Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    unfinished = Path("unfinished-checkpoint-1")
    assert on_disk == {unfinished / name for name in names(checkpoint)}


@pytest.mark.parametrize("step", [1, 2])
def test_one_that_was_being_removed_is_never_taken_for_a_checkpoint(accelerator, tmp_path, monkeypatch, step):
    save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(accelerator, tmp_path, step, OPTIONS, total_limit=1)
    assert tmp_path / "checkpoint-1" not in list_checkpoints(tmp_path)
    monkeypatch.undo()
    save_checkpoint(accelerator, tmp_path, 3, OPTIONS, total_limit=2)
    assert [path for path in names(tmp_path) if path.startswith("unfinished")] == []


def test_the_same_step_again_replaces_it(accelerator, model, tmp_path):
    save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    model.learning.weight.data.fill_(7)
    checkpoint = save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=None)
    assert names(tmp_path) == ["checkpoint-1"]
    assert (safetensors.torch.load_file(checkpoint / "trained.safetensors")["learning.weight"] == 7).all()


def test_pruning_keeps_the_newest_and_always_the_one_just_written(accelerator, tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(accelerator, tmp_path, step, OPTIONS, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    save_checkpoint(accelerator, tmp_path, 1, OPTIONS, total_limit=1)  # a new run in the folder of a longer one
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-10", "checkpoint-100"]


def test_a_run_goes_on_from_a_checkpoint_of_the_same_options_alone(accelerator, tmp_path):
    def choose(name="latest", last_step=3, **changes):
        return choose_checkpoint(tmp_path, name, last_step, accelerator, OPTIONS | changes)

    assert choose(None) is None and choose() is None  # there is none yet
    checkpoint = save_checkpoint(accelerator, tmp_path, 2, OPTIONS, total_limit=None)
    assert choose() == checkpoint == choose("checkpoint-2")
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        choose(None)
    with pytest.raises(ValueError, match="beyond the 1 steps"):
        choose(last_step=1)
    message = r"`images` was \{'night': 5\} and is \{'night': 6\}, `seed` was 0 and is 1. Resume with the same ones"
    with pytest.raises(ValueError, match=message):
        choose(seed=1, images={"night": 6})
    with pytest.raises(ValueError, match="`rank` was None and is 4"):
        choose(rank=4)
    assert choose(max_train_steps=9, unfreeze_step=3) == checkpoint  # a run may become longer
    (checkpoint / "options.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no options\.json"):
        choose()


def test_one_that_was_cut_off_is_named_with_the_one_before_it(accelerator, tmp_path):
    for step in (5, 10, 100):
        save_checkpoint(accelerator, tmp_path, step, OPTIONS, total_limit=None)
    for step, fix in ((10, f"resume from .* `--resume_from_checkpoint {tmp_path}/checkpoint-5`"), (5, "train anew")):
        damaged = tmp_path / f"checkpoint-{step}" / "trained.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-3])
        with pytest.raises(ValueError, match=rf"trained.safetensors in {damaged.parent} is damaged: .* or {fix}"):
            choose_checkpoint(tmp_path, f"checkpoint-{step}", 100, accelerator, OPTIONS)
    assert choose_checkpoint(tmp_path, "latest", 100, accelerator, OPTIONS) == tmp_path / "checkpoint-100"


FILES = ["files.json", "options.json", "optimizer.bin", "random_states_0.pkl", "trained.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_one_of_which_a_part_is_missing_is_named(accelerator, tmp_path, name):
    checkpoint = save_checkpoint(accelerator, tmp_path, 5, OPTIONS, total_limit=None)
    assert set(FILES) <= set(names(checkpoint))
    file = checkpoint / name
    for size in (0, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size] or b"")
        with pytest.raises(ValueError, match=rf"{name} in {checkpoint} is damaged: .*copy it again, or train anew"):
            choose_checkpoint(tmp_path, "latest", 100, accelerator, OPTIONS)
    file.unlink()
    with pytest.raises(ValueError, match=f"{checkpoint} has no {name}: it was copied in part"):
        choose_checkpoint(tmp_path, "latest", 100, accelerator, OPTIONS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"junk", "other"])
def test_damaged_progress_of_the_concepts_is_named(accelerator, tmp_path, content):
    file = tmp_path / "concepts-in-progress.pt"
    torch.save({"weights": torch.zeros(2)}, file) if content == "other" else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is damaged; remove it, and the concepts are learned from"):
        choose_checkpoint(tmp_path, "latest", 100, accelerator, OPTIONS)
    with pytest.raises(ValueError, match="is damaged; remove it"):
        ConceptCheckpoint(accelerator, tmp_path, OPTIONS, StopSignals(accelerator), 1)


def test_finding(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "nowhere", "latest") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11-backup", "unfinished-checkpoint-12", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-13").write_text("a file")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9")) == tmp_path / "checkpoint-9"
    for name in ("checkpoint-8", "logs", "checkpoint-11-backup", "checkpoint-13", ""):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint '.*'; .* has \['checkpoint-9', 'checkpoint-10'\]"):
            find_checkpoint(tmp_path, name)
