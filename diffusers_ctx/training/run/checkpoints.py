"""Checkpoints of a training run: atomic writing, pruning, and finding the one to resume from."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import nn

from .concept_checkpoint import PROGRESS_NAME, contract_of_progress
from .files import flush
from .record import CONTENT


logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-\d+")
_UNFINISHED = "unfinished-"
_WEIGHTS = "trained.safetensors"
_CONTRACT = "options.json"
_FILES = "files.json"  # the size of each other file
_LENGTH = ("max_train_steps", "unfreeze_step")  # a resumed run may be longer


def register_trained_weights(accelerator: Accelerator) -> None:
    """Makes Accelerate's checkpoints hold the weights that learn, and not the whole base model."""

    def save(models: list[nn.Module], weights: list, output_dir: str) -> None:
        if accelerator.is_main_process and weights:  # Accelerate has saved shards already
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
    accelerator: Accelerator, output_dir: Path, step: int, contract: dict[str, Any], total_limit: int | None
) -> Path:
    """Writes `output_dir/checkpoint-<step>` and then removes the oldest earlier ones beyond `total_limit`.

    It is written under another name and renamed when it is complete and on the disk. A run that dies in between, or a
    power failure, leaves nothing that could be taken for a checkpoint.

    Args:
        accelerator: has everything to save.
        output_dir: the run's folder.
        step: optimizer steps done.
        contract: what a run that resumes from it must agree with; see [`~record.resume_contract`].
        total_limit: how many checkpoints to keep; `None` keeps all.

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
            (unfinished / _CONTRACT).write_text(json.dumps(contract, indent=2) + "\n")
            (unfinished / _FILES).write_text(json.dumps(_sizes(unfinished), indent=2) + "\n")
            for file in filter(Path.is_file, unfinished.rglob("*")):
                flush(file)
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # what a full disk raises depends on the writer
        shutil.rmtree(unfinished, ignore_errors=True)
        last = find_checkpoint(output_dir, "latest")
        fix = f"go on from {last.name} with `--resume_from_checkpoint latest`" if last else "begin again"
        raise OSError(
            f"{target} could not be written ({error}). If the disk is full, free some of it, or lower"
            f" `checkpoints_total_limit`; then {fix}."
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
    """Removes incomplete checkpoints of runs that died. All processes must call it."""
    if accelerator.is_main_process:
        for leftover in output_dir.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The folder of a checkpoint.

    Args:
        output_dir: the run's folder.
        name: `latest`, the name of a checkpoint in `output_dir`, or the path of any checkpoint.

    Returns:
        Its path; `None` for `latest` if there is none.

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
    output_dir: Path, name: str | None, last_step: int, accelerator: Accelerator, contract: dict[str, Any]
) -> Path | None:
    """The checkpoint that a run starts from; `None` starts from the beginning.

    Args:
        output_dir: the run's folder.
        name: see `find_checkpoint`; `None` asks for the beginning. `latest` resumes the learning of the concepts if a
            run was stopped before its first checkpoint.
        last_step: the run's last step.
        accelerator: the run's.
        contract: see [`~record.resume_contract`].

    Raises:
        FileNotFoundError: if a named checkpoint does not exist.
        ValueError: if the run cannot resume from it, or would start from the beginning next to checkpoints of an
            earlier run.
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
            _check_contract(output_dir, begun, contract)
        return None
    if checkpoint_step(checkpoint) > last_step:
        raise ValueError(
            f"{checkpoint} is beyond the {last_step} steps of this run; raise `max_train_steps`, or resume from"
            " another checkpoint."
        )
    _check_whole(checkpoint)
    _check_sharding(checkpoint, accelerator)
    _check_contract(checkpoint, _read_contract(checkpoint), contract)
    return checkpoint


def restore_unfreeze_step(checkpoint: Path, contract: dict[str, Any]) -> None:
    """Sets the step at which the backbone begins to learn to the checkpoint's, also in a run that is longer."""
    before = _read_contract(checkpoint)
    contract["unfreeze_step"] = before["unfreeze_step"]
    length, steps, schedule = before["max_train_steps"], contract["max_train_steps"], contract["lr_scheduler"]
    if length != steps and not schedule.startswith("constant"):
        logger.warning(
            f"From here on the learning rate is that of a run of {steps} steps, and not of {length} as before: the"
            f" schedule '{schedule}' depends on it."
        )


def _read_contract(checkpoint: Path) -> dict[str, Any]:
    """The contract of the run that wrote the checkpoint."""
    return json.loads((checkpoint / _CONTRACT).read_text())


def _check_contract(saved: Path, before: dict[str, Any], contract: dict[str, Any]) -> None:
    """Checks that a run has the contract of what was saved: other options would be obeyed in part."""
    changed = [
        f"`{name}` was {before.get(name)} and is {contract.get(name)}"
        for name in sorted({*before, *contract}.difference(_LENGTH, [CONTENT]))
        if before.get(name) != contract.get(name)
    ]
    if before.get(CONTENT) != contract.get(CONTENT):
        changed.append("images, captions or their order have changed")
    if changed:
        raise ValueError(
            f"{saved} is of a run with other options: {', '.join(changed)}. Resume with the same ones, or train"
            " anew into another `output_dir`."
        )


def _check_sharding(checkpoint: Path, accelerator: Accelerator) -> None:
    """Checks that the checkpoint is sharded if and only if the run is; Accelerate would look for other files."""
    sharding = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharding == (checkpoint / _WEIGHTS).exists():
        raise ValueError(
            f"{checkpoint} was made {'without' if sharding else 'with'} FSDP or DeepSpeed; resume with the Accelerate"
            " configuration that it was made with."
        )


def _check_whole(checkpoint: Path) -> None:
    """Checks that it was copied in full, if it was moved; what a run writes is atomic."""
    defect = _defect(checkpoint)
    if defect is None:
        return
    before = [x for x in list_checkpoints(checkpoint.parent) if checkpoint_step(x) < checkpoint_step(checkpoint)]
    earlier = [x for x in before if _defect(x) is None]
    fix = f"resume from the one before it with `--resume_from_checkpoint {earlier[-1]}`" if earlier else "train anew"
    raise ValueError(f"{defect}: it was copied in part, or written by another version; copy it again, or {fix}.")


def _defect(checkpoint: Path) -> str | None:
    """What of it is not there in full, if anything."""
    file = checkpoint / _FILES
    if not file.exists():
        return f"{checkpoint} has no {_FILES}"
    try:
        sizes = dict(json.loads(file.read_text()))
    except ValueError:
        return f"{_FILES} in {checkpoint} is damaged"
    for name, size in sizes.items():
        if not (checkpoint / name).exists():
            return f"{checkpoint} has no {name}"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} in {checkpoint} is damaged"
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The size of each of its files but the list of sizes, in bytes."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items() if name != _FILES}


def _check_no_checkpoints(output_dir: Path) -> None:
    """Checks that a new run does not start next to an older run's checkpoints: `latest` would be the one with the most
    steps, of either run."""
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


def _remove(checkpoint: Path) -> None:
    """Renames it first: a run that dies in between must not leave a part that could be taken for the whole."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{_UNFINISHED}removal-of-{checkpoint.name}")))


def _trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that learn, and the context module, which has learned before."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: weight.detach().cpu().contiguous()
        for name, weight in model.state_dict().items()
        if name in trained or ".context_module." in name
    }
