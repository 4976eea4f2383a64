"""The optimizers that training can use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .config import OptimizationConfig


OPTIMIZERS = ("adamw", "adamw_8bit", "prodigy")


def create_optimizer(
    parameters: Sequence[nn.Parameter], options: OptimizationConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, with its state in 8 bits if so asked, or Prodigy, which finds the learning rate itself.

    Args:
        parameters: what learns.
        options: names the optimizer and its hyperparameters.
        learning_rate: the peak; for Prodigy a factor to what it finds, which is best left at 1.

    Raises:
        ImportError: if the package that the optimizer is in is not installed.
    """
    shared: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **shared)
    if options.optimizer == "adamw_8bit":
        return _import("bitsandbytes").optim.AdamW8bit(parameters, **shared)
    # bias correction and safeguard are what its authors advise for diffusion models
    return _import("prodigyopt").Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **shared)


def check_optimizer(options: OptimizationConfig) -> None:
    """Checks that the optimizer is known and installed.

    Raises:
        ValueError: if it is unknown, or Prodigy is given a learning rate that is meant for another one.
        ImportError: if the package that it is in is not installed.
    """
    if options.optimizer not in OPTIMIZERS:
        raise ValueError(f"Unknown optimizer '{options.optimizer}'; choose one of {list(OPTIMIZERS)}.")
    if options.optimizer == "prodigy":
        _import("prodigyopt")
        if options.learning_rate < 0.1:
            raise ValueError(
                f"`learning_rate` is {options.learning_rate}: Prodigy finds the learning rate itself, and this is a"
                " factor to it; set it to 1."
            )
    if options.optimizer == "adamw_8bit":
        _import("bitsandbytes")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This optimizer needs {name}; run `pip install {name}`.") from error
