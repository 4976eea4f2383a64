from .attention import (
    attach_context_module,
    attached_adapter,
    attached_context_module,
    context_attention_layers,
    detach_context_module,
    lora_detached,
    refuse_weights_on_disk,
    weights_at_hand,
    with_context,
)
from .loader import ContextAdapterLoaderMixin
from .lora import LORA_ADAPTER


__all__ = [
    "LORA_ADAPTER",
    "ContextAdapterLoaderMixin",
    "attach_context_module",
    "attached_adapter",
    "attached_context_module",
    "context_attention_layers",
    "detach_context_module",
    "lora_detached",
    "refuse_weights_on_disk",
    "weights_at_hand",
    "with_context",
]
