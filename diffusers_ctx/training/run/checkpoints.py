"""Checkpoints of a training run: written whole or not at all, pruned, found again."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from torch import nn

from .concept_checkpoint import PROGRESS_NAME, contract_of_progress
from .record import CONTENT


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-\d+")
_UNFINISHED = "unfinished-"
_WEIGHTS = "trained.safetensors"
_OPTIONS = "options.json"
_OF_LENGTH = ("max_train_steps", "unfreeze_step")  # a run may become longer


def register_trained_weights(accelerator: Accelerator) -> None:
    """Lets checkpoints hold what a run learns, and not the base model again each time."""

    def save(models: list[nn.Module], weights: list, output_dir: str) -> None:
        if accelerator.is_main_process and weights:  # those of shards Accelerate has saved by itself
            for model in models:
                state = _trained_state(accelerator.unwrap_model(model, keep_torch_compile=False))
                safetensors.torch.save_file(state, Path(output_dir) / _WEIGHTS)
        weights.clear()  # tells Accelerate that there is nothing left to save

    def load(models: list[nn.Module], input_dir: str) -> None:
        while models:
            model = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            state = safetensors.torch.load_file(Path(input_dir) / _WEIGHTS)
            expected = _trained_state(model)
            if state.keys() != expected.keys():
                raise ValueError(
                    f"The checkpoint {input_dir} holds other parameters than this run trains; resume with the options"
                    " that it was made with."
                )
            model.load_state_dict(state, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, options: dict[str, Any], total_limit: int | None
) -> Path:
    """Writes `output_dir/checkpoint-<step>`, then removes the oldest of those up to it beyond `total_limit`.

    It is written under another name and renamed when it is whole and on the disk: a run that dies in between, or whose
    power fails, leaves nothing that could be taken for a checkpoint. `options` are those that a run which resumes from
    it must have.

    Raises:
        OSError: if it cannot be written; nothing is left of it.
    """
    target = output_dir / f"checkpoint-{step}"
    unfinished = output_dir / f"{_UNFINISHED}{target.name}"
    remove_unfinished(accelerator, output_dir)
    try:
        accelerator.save_state(str(unfinished), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / _OPTIONS).write_text(json.dumps(options, indent=2) + "\n")
            _flush(unfinished)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is all three, by what writes
        shutil.rmtree(unfinished, ignore_errors=True)
        last = find_checkpoint(output_dir, "latest")
        go_on = f"go on from {last.name} with `--resume_from_checkpoint latest`" if last else "begin again"
        raise OSError(
            f"{target} could not be written ({error}). If the disk is full, free some of it, or lower"
            f" `checkpoints_total_limit`; then {go_on}."
        ) from error
    if accelerator.is_main_process:
        if target.exists():
            _remove(target)
        unfinished.rename(target)
        earlier = [path for path in list_checkpoints(output_dir) if checkpoint_step(path) <= step]
        for old in earlier[:-total_limit] if total_limit else []:
            _remove(old)
    accelerator.wait_for_everyone()
    return target


def remove_unfinished(accelerator: Accelerator, output_dir: Path) -> None:
    """Removes what runs that died have left half-written or half-removed. All processes must call it."""
    if accelerator.is_main_process:
        for leftover in output_dir.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The folder of a checkpoint: `latest`, one in `output_dir`, or any path. `None` if there is no latest one.

    Raises:
        FileNotFoundError: if a named checkpoint does not exist.
    """
    checkpoints = list_checkpoints(output_dir)
    if name == "latest":
        return checkpoints[-1] if checkpoints else None
    for path in (output_dir / name, Path(name)):
        if _is_checkpoint(path):
            return path
    raise FileNotFoundError(
        f"There is no checkpoint '{name}'; {output_dir} has {[path.name for path in checkpoints]}."
    )


def choose_checkpoint(
    output_dir: Path, name: str | None, last_step: int, accelerator: Accelerator, options: dict[str, Any]
) -> Path | None:
    """The checkpoint that a run starts from; `None` is the beginning.

    Args:
        output_dir: the run's folder.
        name: see `find_checkpoint`; `None` asks for the beginning. Without a checkpoint, `latest` goes on with
            learning the concepts, where a run was stopped in that.
        last_step: the run's last step.
        accelerator: the run's.
        options: what decides what the run learns.

    Raises:
        FileNotFoundError: if a named checkpoint does not exist.
        ValueError: if the run cannot go on from there, as where a file of it is cut off, or would begin anew beside
            an earlier run's checkpoints.
    """
    if name is None:
        _check_no_checkpoints(output_dir)
        return None
    checkpoint = find_checkpoint(output_dir, name)
    if checkpoint is None:
        begun = contract_of_progress(output_dir)
        if begun is None:
            logger.warning(f"There is no checkpoint in {output_dir} yet; training starts from the beginning.")
        else:
            _check_options(output_dir, begun, options)
        return None
    if checkpoint_step(checkpoint) > last_step:
        raise ValueError(
            f"{checkpoint} is beyond the {last_step} steps of this run; raise `max_train_steps`, or resume from"
            " another checkpoint."
        )
    _check_kind(checkpoint, accelerator)
    _check_whole(checkpoint)
    _check_options(checkpoint, _read_options(checkpoint), options)
    return checkpoint


def restore_unfreeze_step(checkpoint: Path, options: dict[str, Any]) -> None:
    """Puts into the options of a run that goes on for longer than was planned what stays as it was planned."""
    before = _read_options(checkpoint)
    options["unfreeze_step"] = before["unfreeze_step"]
    length, steps, schedule = before["max_train_steps"], options["max_train_steps"], options["lr_scheduler"]
    if length != steps and not schedule.startswith("constant"):
        logger.warning(
            f"From here on the learning rate is that of a run of {steps} steps, and not of {length} as before: the"
            f" schedule '{schedule}' depends on it."
        )


def _read_options(checkpoint: Path) -> dict[str, Any]:
    """The options of the run that wrote it."""
    file = checkpoint / _OPTIONS
    if not file.exists():
        raise ValueError(f"{checkpoint} has no {_OPTIONS}: it was not written by this version of the training script.")
    return json.loads(file.read_text())


def _check_options(kept: Path, before: dict[str, Any], options: dict[str, Any]) -> None:
    """Checks that a run has the options of what was kept: others would be half ignored, half obeyed."""
    changed = [
        f"`{name}` was {before.get(name)} and is {options.get(name)}"
        for name in sorted({*before, *options}.difference(_OF_LENGTH, [CONTENT]))
        if before.get(name) != options.get(name)
    ]
    if CONTENT in before and before[CONTENT] != options.get(CONTENT):  # checkpoints of the first days do not say
        changed.append("images, captions or their order are not what they were")
    if changed:
        raise ValueError(
            f"{kept} is of a run with other options: {', '.join(changed)}. Resume with the same ones, or train"
            " anew into another `output_dir`."
        )


def _check_kind(checkpoint: Path, accelerator: Accelerator) -> None:
    """Checks that a checkpoint has weights in shards where this run has them so, and whole ones otherwise; Accelerate
    would look for other files."""
    sharding = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharding == (checkpoint / _WEIGHTS).exists():
        raise ValueError(
            f"{checkpoint} was made {'without' if sharding else 'with'} FSDP or DeepSpeed; resume with the Accelerate"
            " configuration that it was made with."
        )


def _check_whole(checkpoint: Path) -> None:
    """Checks that none of its files is cut off. Weights are not read, only where a file says how long it must be."""
    damaged = [file for file in sorted(checkpoint.iterdir()) if not _is_whole(file)]
    if not damaged:
        return
    earlier = [x for x in list_checkpoints(checkpoint.parent) if checkpoint_step(x) < checkpoint_step(checkpoint)]
    go_on = f"go on from the one before it with `--resume_from_checkpoint {earlier[-1]}`" if earlier else "train anew"
    raise ValueError(f"{damaged[0]} is damaged, and nothing can go on from {checkpoint.name}; {go_on}.")


def _is_whole(file: Path) -> bool:
    if file.suffix in (".bin", ".pkl"):  # what `torch.save` writes ends with its table of contents
        return is_zipfile(file)
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):
                pass
    except (ValueError, SafetensorError):
        return False
    return True


def _check_no_checkpoints(output_dir: Path) -> None:
    """Checks that a run which starts from the beginning leaves no older run's checkpoints to be resumed from: `latest`
    would be the one with the most steps, of whichever run."""
    if found := [*list_checkpoints(output_dir), *output_dir.glob(PROGRESS_NAME)]:
        raise ValueError(
            f"{output_dir} has checkpoints of an earlier run, such as {found[-1].name}; go on from there with"
            " `--resume_from_checkpoint latest`, choose another `output_dir`, or remove them."
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints in `output_dir`, oldest first."""
    return sorted(filter(_is_checkpoint, output_dir.glob("*")), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which it was made."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_checkpoint(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None and path.is_dir()


def _flush(folder: Path) -> None:
    """Waits until the disk has a folder's files: where power fails, a name may have come there before its content."""
    if os.name != "posix":  # where folders cannot be opened
        return
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError) if path.is_dir() else nullcontext():  # some network disks cannot do it for folders
                os.fsync(handle)
        finally:
            os.close(handle)


def _remove(checkpoint: Path) -> None:
    """Renames it first: a run that dies in between must not leave a part of it that could be taken for the whole."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{_UNFINISHED}removal-of-{checkpoint.name}")))


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What learns, and the context module, part of which learned before."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: weight.detach().cpu().contiguous()
        for name, weight in model.state_dict().items()
        if name in trained or ".context_module." in name
    }
