"""Copies of adapters on disk, in another precision."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..adapter_format import (
    CARD_NAME,
    CONFIG_NAME,
    LORA_WEIGHTS_NAME,
    MODULE_FOLDER,
    RECORD_NAME,
    WEIGHTS_NAME,
    adapter_files,
    read_adapter_config,
    validate_adapter_folder,
)
from ..hub import with_usage_of
from ..paths import local_path


def copy_adapter(source: str | os.PathLike, target: str | os.PathLike, dtype: torch.dtype) -> Path:
    """Copies an adapter with its card, its attention weights and LoRA as numbers of another type.

    A pipeline of any precision loads the copy, as it loads any LoRA. The context module stays as it is: it is small,
    and counterfactuals invert its mechanisms. Files of another adapter that was copied there before are replaced or
    removed.

    Args:
        source: folder of the adapter.
        target: folder to write to; created if missing.
        dtype: of the weights, such as `torch.float16`, which takes half the bytes of float32.

    Raises:
        AdapterError: if the adapter is not complete.
        ValueError: if both folders are the same, or the adapter was trained together with its UNet, which would be
            left behind.
    """
    source, target = local_path(source), local_path(target)
    config = validate_adapter_folder(source)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} holds the adapter itself; give another folder for the copy.")
    if config["mode"] == "full":
        raise ValueError("The adapter was trained together with its UNet and is nothing without it; export both.")
    if (target / CONFIG_NAME).exists():
        for name in (LORA_WEIGHTS_NAME, CARD_NAME, RECORD_NAME):  # all other files of an adapter are replaced
            (target / name).unlink(missing_ok=True)
    for name in [*adapter_files(config), CARD_NAME, RECORD_NAME]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name in (WEIGHTS_NAME, LORA_WEIGHTS_NAME):
            _cast(source / name, target / name, dtype)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return target


def copy_what_was_trained(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Gives an adapter that was saved within its pipeline what that loses of the one that was loaded.

    The context module is that of the source to the bit, as in `copy_adapter`, whatever the pipeline's precision. Card
    and record say what was trained and measured; of the card in the target, only the usage stays.

    Args:
        source: folder of the adapter that was loaded.
        target: its folder within the pipeline's.

    Raises:
        AdapterError: if the source's config cannot be read.
    """
    source, target = local_path(source), local_path(target)
    for name in adapter_files(read_adapter_config(source)):
        if name.startswith(MODULE_FOLDER):
            shutil.copyfile(source / name, target / name)
    (target / RECORD_NAME).unlink(missing_ok=True)  # of an adapter that was here before
    if (source / RECORD_NAME).is_file():
        shutil.copyfile(source / RECORD_NAME, target / RECORD_NAME)
    if (source / CARD_NAME).is_file():
        ours, theirs = ((folder / CARD_NAME).read_text(encoding="utf-8") for folder in (source, target))
        (target / CARD_NAME).write_text(with_usage_of(ours, theirs), encoding="utf-8")


def _cast(source: Path, target: Path, dtype: torch.dtype) -> None:
    with safe_open(source, framework="pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, target, metadata)
