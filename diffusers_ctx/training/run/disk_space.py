"""Room on the disk for checkpoints and the final adapter."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from ...adapter import backbone_of_pipeline
from ...pipelines import CompositionMixin
from ..config import TrainingConfig


logger = logging.getLogger(__name__)

# values that the optimizer keeps for each weight
_OPTIMIZER_VALUES = {"adamw": 2, "adamw_8bit": 0.5, "prodigy": 4}


def check_free_disk(
    folder: Path,
    config: TrainingConfig,
    learned: int,
    pipeline: CompositionMixin,
    accelerator: Accelerator,
    steps: int,
) -> None:
    """Checks that a checkpoint and the final adapter fit into the folder; warns if the checkpoints to keep do not.

    Args:
        folder: where they are saved.
        config: the run's options.
        learned: number of weights that learn with the diffusion loss.
        pipeline: the pipeline, with its context adapter.
        accelerator: says whether weights are sharded.
        steps: optimizer steps that are left.

    Raises:
        OSError: if there is no room.
    """
    checkpoint = _checkpoint_size(config, learned, pipeline, accelerator)
    adapter = _adapter_size(config, learned, pipeline)
    free = shutil.disk_usage(folder).free
    if free < checkpoint + adapter:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free; a checkpoint takes {checkpoint / 1e9:.1f} GB and the final"
            f" adapter {adapter / 1e9:.1f} GB. Free some, or choose another `output_dir`."
        )
    count = math.ceil(steps / config.output.checkpointing_steps)
    if config.output.checkpoints_total_limit is not None:  # a new one is written before the oldest is removed
        count = min(count, config.output.checkpoints_total_limit + 1)
    if free < count * checkpoint + adapter:
        logger.warning(
            f"{folder} has {free / 1e9:.1f} GB free, and {count} checkpoints of {checkpoint / 1e9:.1f} GB do not fit;"
            " lower `checkpoints_total_limit`, or raise `checkpointing_steps`."
        )


def _checkpoint_size(
    config: TrainingConfig, learned: int, pipeline: CompositionMixin, accelerator: Accelerator
) -> float:
    """Bytes of the weights that learn, the optimizer's state and the average, in float32, and of the concepts."""
    options = config.optimization
    copies = 1 + _OPTIMIZER_VALUES[options.optimizer] + options.use_ema
    size = 4 * copies * learned + _concepts_size(pipeline)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        size += _size(backbone_of_pipeline(pipeline).model)  # they save the frozen weights, too
    return size


def _adapter_size(config: TrainingConfig, learned: int, pipeline: CompositionMixin) -> float:
    """Bytes of the adapter, and in mode full of the rest of the pipeline, which is saved with it."""
    adapter = 4 * learned + _concepts_size(pipeline)
    if config.model.mode != "full":
        return adapter
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    backbone = backbone_of_pipeline(pipeline).model
    return adapter + sum(_size(model) for model in models if model is not backbone)


def _concepts_size(pipeline: CompositionMixin) -> int:
    """Bytes of the context module without the read-out, which is among the weights that learn."""
    return _size(pipeline.context_module) - _size(pipeline.context_module.read_out)


def _size(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
