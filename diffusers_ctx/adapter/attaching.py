"""A context module on a model that denoises, whatever its family."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..context import ContextModule
from .backbones import backbone_of


def attach_context_module(model: Any, context_module: ContextModule, injection: str | None = None) -> None:
    """Lets a model attend to the tokens of `context_module`.

    Args:
        model: a UNet, or a transformer of a family that [`backbone_of`] knows.
        context_module: the module.
        injection: `"cross_attention"` gives every such layer of a UNet keys and values for the tokens. Values start at
            zero: a fresh adapter changes nothing. `"prompt"` puts the tokens behind those of the text and adds no
            weights. By default the former, and the latter for transformers.

    Raises:
        ValueError: if the model or the injection is unknown, the model already has a context adapter or an IP-Adapter,
            its text has another width, or `enable_sequential_cpu_offload` has put its weights away.
    """
    backbone_of(model).attach(context_module, injection)


def context_attention_layers(model: Any) -> nn.ModuleDict:
    """The adapter's own weights in the attention layers, by the name of the layer (dots become slashes)."""
    return backbone_of(model).attention_layers
