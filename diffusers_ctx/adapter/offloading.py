"""Weights that offloading has put away: bringing them back for work outside of a model's own `forward`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import align_module_device
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While it is open, all weights of `module` are on `device`, also those that offloading keeps in memory.

    Offloaded groups of layers return by themselves only for a layer's own `forward`, and only one by one.
    """
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        before = next(module.parameters()).device
        if before == device:  # layers that were offloaded one by one go back by themselves
            yield
            return
        nn.Module.to(module, device)  # bypasses the warnings of diffusers' models
        try:
            yield
        finally:
            nn.Module.to(module, before)


def check_no_disk_offload(model: nn.Module) -> None:
    """Refuses weights on disk, which only a layer's own `forward` restores; those in memory `on_device` finds.

    Raises:
        ValueError: if group offloading has moved weights to disk.
    """
    for part in model.modules():
        registry = getattr(part, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if hook is not None and hook.config.offload_to_disk_path is not None:
            raise ValueError(
                "Context adapters cannot be offloaded to disk; call `enable_group_offload(...)` without"
                " `offload_to_disk_path`."
            )


def move_to(part: nn.Module, device: torch.device) -> None:
    """Moves a part that was taken off a model to where the model is now.

    `enable_model_cpu_offload` may have moved the model meanwhile, and assumes that all of it is in one place.
    """
    if device.type != "meta":  # layers that `enable_sequential_cpu_offload` has put away stay where they are
        part.to(device)
