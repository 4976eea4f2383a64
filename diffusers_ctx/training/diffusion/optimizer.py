"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..config import OptimizationConfig


logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 500


def create_optimizer(
    parameters: Sequence[nn.Parameter], options: OptimizationConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW, AdamW with its state in 8 bits, or Prodigy, which finds the learning rate itself.

    Args:
        parameters: the parameters that learn.
        options: the optimizer and its hyperparameters.
        learning_rate: the peak; Prodigy multiplies the rate that it finds by it, and is best left at 1.

    Raises:
        ImportError: if the optimizer's package is not installed.
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
    # its authors advise bias correction and safeguard for diffusion models
    return _import("prodigyopt").Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **shared)


def create_schedule(optimizer: torch.optim.Optimizer, options: OptimizationConfig, steps: int) -> LambdaLR:
    """The schedule of the learning rate over a run of `steps` optimizer steps."""
    warm_up = _warm_up_steps(options)
    return get_scheduler(options.lr_scheduler, optimizer, num_warmup_steps=warm_up, num_training_steps=steps)


def warn_of_warm_up(options: OptimizationConfig, steps: int) -> None:
    """Warns if a run ends before its learning rate has reached its peak."""
    if options.lr_scheduler != "constant" and steps <= (warm_up := _warm_up_steps(options)):
        logger.warning(
            f"The learning rate grows for {warm_up} steps, and the run has {steps}: it ends before the rate has"
            " reached its peak; lower `lr_warmup_steps`."
        )


def _warm_up_steps(options: OptimizationConfig) -> int:
    return _WARM_UP_STEPS if options.lr_warmup_steps is None else options.lr_warmup_steps


def check_optimizer(options: OptimizationConfig, learning_rate: float) -> None:
    """Checks that the optimizer is installed, and that it and the schedule accept their options.

    Args:
        options: the optimizer, the schedule and their hyperparameters.
        learning_rate: the peak.

    Raises:
        ValueError: if one refuses an option, the schedule would ignore its warm-up, or Prodigy is given a learning
            rate that is meant for another optimizer.
        ImportError: if the optimizer's package is not installed.
    """
    if options.lr_scheduler == "constant" and options.lr_warmup_steps:
        raise ValueError(
            f"`lr_warmup_steps` is {options.lr_warmup_steps}, and the schedule `constant` has no warm-up; set"
            " `lr_scheduler` to constant_with_warmup, or leave the warm-up out."
        )
    try:
        create_schedule(create_optimizer([nn.Parameter(torch.zeros(1))], options, learning_rate), options, steps=1)
    except ValueError as error:
        raise ValueError(f"The optimizer or its schedule cannot work with these options: {error}.") from error
    if options.optimizer == "prodigy" and options.learning_rate < 0.1:
        raise ValueError(
            f"`learning_rate` is {options.learning_rate}, and Prodigy multiplies the rate that it finds by it; set it"
            " to 1."
        )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"This optimizer needs {name}; run `pip install {name}`.") from error
