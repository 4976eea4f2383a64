"""Weights that are spread over processes in shards, as FSDP2 keeps them: how to have them whole, and in shards again.

Tensors that are not sharded pass through everything here as they are.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor


def configure_sharding(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Has FSDP2 and DeepSpeed compute what plain data parallelism computes."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        # autocast is left to choose what is computed in half precision: this would round timesteps' noise levels too
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        plugin.cpu_ram_efficient_loading = False  # every process has loaded the weights by itself
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        # DeepSpeed steps within the backward pass, and clips there
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = max_grad_norm


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor. All processes must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device and in the shards of another one. All processes must ask for it."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives sharded parameters the state that AdamW would give each in its own first step.

    Shards can be loaded only where every parameter had a state when they were saved, also one that was still to wait.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if isinstance(parameter, DTensor):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | moments


def gather_weights(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives the main process the whole weights, in memory of the CPU; there the model can be saved, and not run.

    All processes must call it. `Accelerator.get_state_dict` returns a copy of the weights, and a pipeline saves the
    model itself.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                weight = full_tensor(parameter.detach())
                if accelerator.is_main_process:
                    setattr(module, name, nn.Parameter(weight.cpu(), requires_grad=parameter.requires_grad))
