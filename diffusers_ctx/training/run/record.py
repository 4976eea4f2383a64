"""The record of a run: its options, what a resumed run must have in common with it, and its part of the model card."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import accelerate
import datasets
import diffusers
import peft
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from ...adapter_format import RECORD_NAME
from ...fingerprint import fingerprint
from ...version import __version__
from ..config import TrainingConfig


_AN_END = 1024  # bytes of a file
_LIBRARIES = (torch, diffusers, transformers, accelerate, peft, datasets)


def write_options(config: TrainingConfig, folder: Path) -> None:
    """Writes every option of a run into an adapter's folder."""
    (folder / RECORD_NAME).write_text(json.dumps(flatten_options(config), indent=2) + "\n")


def flatten_options(config: TrainingConfig) -> dict[str, Any]:
    """Every option by the name of its flag, except for the Hub's token."""
    options = {name: value for group in vars(config).values() for name, value in vars(group).items()}
    del options["hub_token"]
    return options


def tracked_options(config: TrainingConfig) -> dict[str, Any]:
    """Every option, as trackers take them."""
    return {
        name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
        for name, value in flatten_options(config).items()
    }


def resume_contract(
    config: TrainingConfig,
    accelerator: Accelerator,
    concepts: Sequence[str],
    resolution: int,
    steps: int,
    images: datasets.Dataset,
    models: Iterable[nn.Module],
) -> dict[str, Any]:
    """The options that decide the outcome of a run, and fingerprints of the data and the base model.

    A resumed run must have the same contract, except for its length. The same model and images may lie elsewhere, and
    a batch may be divided among another number of processes, unless each reads its own part of a stream.

    Args:
        config: the run's options.
        accelerator: the run's processes and precision.
        concepts: the concepts to learn.
        resolution: height and width of the images.
        steps: optimizer steps.
        images: the training images; with streaming, those that the concepts are learned on.
        models: the models of the base, before training.
    """
    assert config.model.unfreeze_after is not None, "`with_unfreezing` chooses it"
    free = {*_MAY_CHANGE, *vars(config.output)}
    if config.data.streaming:  # a place in one dataset is none in another
        free -= {"dataset_name", "dataset_config_name", "dataset_split"}
    options = {name: value for name, value in flatten_options(config).items() if name not in free}
    if config.data.streaming:
        options["processes"] = accelerator.num_processes
    else:
        options[CONTENT] = _fingerprint_of_images(images)
    return options | {
        "concepts": list(concepts),
        "resolution": resolution,
        "train_batch_size of all processes": config.optimization.train_batch_size * accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "images": dict(sorted(Counter(images["context"]).items())),
        "weights of the base model": _fingerprint_of_weights(models),
        "max_train_steps": steps,
        "unfreeze_step": math.ceil(config.model.unfreeze_after * steps),
    }


CONTENT = "content of images, captions and contexts"
"""Names their fingerprint, a hash that a message does not show."""

_MAY_CHANGE = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "enable_xformers_memory_efficient_attention",
    "gradient_checkpointing",
    "train_data_dir",
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "skip_unreadable",
    "cache_latents",
    "dataloader_num_workers",
    "cache_dir",
    "unfreeze_after",
    "train_batch_size",
    "num_train_epochs",
    "allow_tf32",
)


def _fingerprint_of_weights(models: Iterable[nn.Module]) -> str:
    """The fingerprint of the first values of each weight: they differ between models that were trained apart, and a
    base model of gigabytes is not hashed at each start."""
    weights = (parameter for model in models for parameter in model.parameters())
    return fingerprint(*(weight.detach().flatten()[:64].float() for weight in weights))


def _fingerprint_of_images(images: datasets.Dataset) -> str:
    """The fingerprint of contexts and captions, in order, and of each image file's length, beginning and end: a
    dataset of terabytes is not read at each start."""
    files = images.select_columns("image").cast_column("image", datasets.Image(decode=False))
    ends = []
    for row in files:
        content, path = row["image"]["bytes"], row["image"]["path"]
        with Path(path).open("rb") if content is None else BytesIO(content) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _AN_END))
            end = file.read()
            file.seek(0)
            ends.append((length, file.read(_AN_END), end))
    return fingerprint(list(images["context"]), list(images["text"]), ends)


def training_record(
    config: TrainingConfig, accelerator: Accelerator, steps: int, images: int, resolution: int
) -> dict[str, Any]:
    """How an adapter was trained, for its model card; see [`~hub.render_model_card`]."""
    options = config.optimization
    per_step = options.train_batch_size * accelerator.num_processes * options.gradient_accumulation_steps
    return {
        "command": _command(),
        "seed": options.seed,
        "machine": f"{platform.machine()}, {accelerator.num_processes} x {accelerator.device.type}",
        "versions": {"diffusers_ctx": __version__} | {library.__name__: library.__version__ for library in _LIBRARIES},
        "hyperparameters": {
            "steps": steps,
            "batch size": per_step,
            "resolution": resolution,
            "learning rate": options.learning_rate,
            "mixed precision": accelerator.mixed_precision,
            "causal form": config.context.causal_form,
            "posterior encoder": config.context.posterior_encoder,
            "images": f"streamed, concepts learned on {images}" if config.data.streaming else images,
        },
    }


def _command() -> list[str]:
    """The command line of this process, without the launcher's own flags, which it cannot see."""
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ  # set by `accelerate launch` alone
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `-m`, which leaves a path of this machine in `argv`
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return [*(["accelerate", "launch"] if launched else ["python"]), *program, *sys.argv[1:]]
