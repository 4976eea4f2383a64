"""The Accelerator of a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast,
)
from torch import nn

from ..config import TrainingConfig
from .sharding import configure_sharding


def create_accelerator(config: TrainingConfig) -> Accelerator:
    """Also allows TF32, if asked to, and sets FSDP and DeepSpeed up."""
    options, output = config.optimization, config.output
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        # otherwise an epoch's last batches would make a step of their own, and steps could not be counted
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        mixed_precision=options.mixed_precision,
        log_with=None if output.report_to == "none" else output.report_to,
        kwargs_handlers=[
            # the last layer of the first text encoder of Stable Diffusion XL has no part in the loss
            DistributedDataParallelKwargs(find_unused_parameters=config.model.train_text_encoder),
            # the others wait while the main process validates, saves and pushes
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
        ],
        project_config=ProjectConfiguration(
            project_dir=output.output_dir, logging_dir=str(Path(output.output_dir, output.logging_dir))
        ),
    )
    configure_sharding(accelerator, options.max_grad_norm)
    return accelerator


def broadcast_weights(module: nn.Module) -> None:
    """Gives every process the main one's weights: where all have done the same, they may have rounded otherwise."""
    for tensor in module.state_dict().values():
        tensor.copy_(broadcast(tensor))
