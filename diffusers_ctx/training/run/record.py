"""What a run says about itself: to trackers, beside its weights and on the model card."""

from __future__ import annotations

import hashlib
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

from ...version import __version__
from ..config import TrainingConfig


_AN_END = 1024  # bytes of a file
_LIBRARIES = (torch, diffusers, transformers, accelerate, peft, datasets)


def flatten_options(config: TrainingConfig) -> dict[str, Any]:
    """Every option by the name of its flag; the token stays out."""
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
    """The options that decide what a run learns, and what it learns from.

    A run that resumes must have them as they were, but for its length. It may find the same model and images in other
    places, and divide a batch among other processes, unless each has its own part of a stream.

    Args:
        config: the run.
        accelerator: its processes and precision.
        concepts: the concepts that it learns.
        resolution: height and width of its images.
        steps: its optimizer steps.
        images: those that it trains on, or with streaming, learns the concepts on.
        models: those of the base, before anything has learned.
    """
    assert config.model.unfreeze_after is not None, "`with_unfreezing` chooses it"
    free = {*_MAY_CHANGE, *vars(config.output)}
    if config.data.streaming:  # a place in one dataset is none in another
        free -= {"dataset_name", "dataset_config_name", "dataset_split"}
    options = {name: value for name, value in flatten_options(config).items() if name not in free}
    if config.data.streaming:
        options["processes"] = accelerator.num_processes
    else:
        options[CONTENT] = _digest_of_images(images)
    return options | {
        "concepts": list(concepts),
        "resolution": resolution,
        "train_batch_size of all processes": config.optimization.train_batch_size * accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "images": dict(sorted(Counter(images["context"]).items())),
        "weights of the base model": _digest(models),
        "max_train_steps": steps,
        "unfreeze_step": math.ceil(config.model.unfreeze_after * steps),
    }


CONTENT = "content of images, captions and contexts"
"""The option that is a digest of them, which says nothing to people."""

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


def _digest(models: Iterable[nn.Module]) -> str:
    """A digest of where each of the weights begins: of two models that were trained apart, all differ."""
    weights = (parameter for model in models for parameter in model.parameters())
    beginnings = (weight.detach().flatten()[:64].float().cpu().numpy() for weight in weights)
    return hashlib.sha256(b"".join(beginning.tobytes() for beginning in beginnings)).hexdigest()[:16]


def _digest_of_images(images: datasets.Dataset) -> str:
    """A digest of contexts and captions, in order, and of how long each image's file is, how it begins and ends."""
    digest = hashlib.sha256(repr((list(images["context"]), list(images["text"]))).encode())
    for row in images.select_columns("image").cast_column("image", datasets.Image(decode=False)):
        content, path = row["image"]["bytes"], row["image"]["path"]
        with Path(path).open("rb") if content is None else BytesIO(content) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - _AN_END))
            end = file.read()
            file.seek(0)
            digest.update(repr((length, file.read(_AN_END), end)).encode())
    return digest.hexdigest()[:16]


def training_record(
    config: TrainingConfig, accelerator: Accelerator, steps: int, images: int, resolution: int
) -> dict[str, Any]:
    """How an adapter was trained, as its model card tells it; see [`~hub.render_model_card`]."""
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
    """The command line of this process; the launcher's own flags are not known to it."""
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ  # which `accelerate launch` always sets, and nothing else
    return [*(["accelerate", "launch"] if launched else ["python"]), *sys.argv]
