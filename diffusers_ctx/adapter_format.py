"""The format of a context adapter on disk: its files, and the checks that run before any of them is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open

from .embedded import embedded_call


FORMAT_VERSION = 2  # of adapters without noise, which older versions would draw; 1 of all others
LIBRARY = "diffusers_ctx"
Mode = Literal["frozen", "lora", "full"]
Injection = Literal["cross_attention", "prompt"]
MODES: tuple[Mode, ...] = get_args(Mode)
INJECTIONS: tuple[Injection, ...] = get_args(Injection)

CONFIG_NAME = "context_adapter_config.json"
WEIGHTS_NAME = "context_adapter.safetensors"
MODULE_FOLDER = "context_module"
ADAPTER_FOLDER = "context_adapter"  # of a pipeline that is saved with its adapter
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
CARD_NAME = "README.md"
RECORD_NAME = "training_config.json"

_FIELDS: dict[str, type] = {"base": dict, "concepts": list, "obs_context": str, "mode": str, "injection": str}
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class AdapterError(ValueError):
    """A context adapter cannot be read; the message names the file and the fix."""


def read_adapter_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The checked config of the adapter in `folder`.

    Raises:
        AdapterError: if there is none, it is not valid JSON, another program or a newer version wrote it, or a field
            is missing or wrong.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"There is no {path}: pass the folder that `save_context_adapter` wrote.")
    config = _read_json(path)
    _check_origin(config, path)
    _check_fields(config, path)
    return config


def validate_adapter_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Checks that every file of the adapter in `folder` is there and whole, and returns its config.

    Of weights only the header is read, which says how long the file must be.

    Raises:
        AdapterError: like `read_adapter_config`, and if a file is missing, truncated or a pickle.
    """
    config = read_adapter_config(folder)
    for name in adapter_files(config):
        path = Path(folder) / name
        if path.suffix == ".safetensors":
            _check_weights(path)
        else:
            _read_json(path)
    return config


def adapter_files(config: dict[str, Any]) -> list[str]:
    """Names, relative to the adapter's folder, of the files that loading an adapter with this config takes."""
    names = [
        CONFIG_NAME,
        WEIGHTS_NAME,
        f"{MODULE_FOLDER}/config.json",
        f"{MODULE_FOLDER}/diffusion_pytorch_model.safetensors",
    ]
    return [*names, LORA_WEIGHTS_NAME] if config["mode"] == "lora" else names


def public_name(base_model: str | None) -> str | None:
    """The base model's name as an adapter may publish it: of a local folder only the last part."""
    if base_model is None:
        return None
    if call := embedded_call(base_model):
        return call
    return Path(base_model).name if Path(base_model).exists() else base_model


def safetensors_defect(path: Path) -> str | None:
    """Why a safetensors file cannot be read, from its header alone; `None` if it is whole."""
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        return str(error)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}): save or download the adapter again.") from error
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}): save or download the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds no JSON object: save or download the adapter again.")
    return content


def _check_origin(config: dict[str, Any], path: Path) -> None:
    if config.get("library") != LIBRARY:
        raise AdapterError(
            f"{path} was not written by {LIBRARY} (its `library` is {config.get('library')!r}): load it with the "
            "program that wrote it."
        )
    version = config.get("format_version")
    if type(version) is not int or version < 1:  # True is an int, too
        raise AdapterError(f"{path} has the unknown format version {version!r}: save the adapter again.")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format version {version}, and this diffusers_ctx reads up to {FORMAT_VERSION}: upgrade "
            "diffusers_ctx."
        )


def _check_fields(config: dict[str, Any], path: Path) -> None:
    for field, kind in _FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise AdapterError(f"`{field}` in {path} is missing or no {kind.__name__}: save the adapter again.")
    for field, choices in (("mode", MODES), ("injection", INJECTIONS)):
        if config[field] not in choices:
            raise AdapterError(f"`{field}` in {path} is {config[field]!r}; known are {', '.join(choices)}.")
    concepts = config["concepts"]
    if not concepts or not all(isinstance(concept, str) and concept for concept in concepts):
        raise AdapterError(f"`concepts` in {path} must be names, at least one: it is {concepts!r}.")
    repeated = sorted({concept for concept in concepts if concepts.count(concept) > 1})
    if repeated:
        raise AdapterError(f"`concepts` in {path} names {', '.join(repeated)} more than once: keep one of each.")
    if config["obs_context"] in concepts:
        raise AdapterError(
            f"{config['obs_context']!r} in {path} is both the observational context and a concept: rename one."
        )


def _check_weights(path: Path) -> None:
    if not path.is_file():
        for pickle in map(path.with_suffix, _PICKLE_SUFFIXES):
            if pickle.is_file():
                raise AdapterError(
                    f"{pickle} is a pickle, which can run any code when it is loaded. Only safetensors are read: let "
                    f"its author save {path.name}."
                )
        raise AdapterError(f"There is no {path}: save or download the adapter again.")
    if defect := safetensors_defect(path):
        raise AdapterError(
            f"{path} is truncated or no safetensors file ({defect}): save or download it again; in a git clone, run "
            "`git lfs pull`."
        )
