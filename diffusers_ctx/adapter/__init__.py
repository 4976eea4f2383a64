from .attention import (
    add_context_tokens,
    attach_context_module,
    attached_adapter,
    attached_context_module,
    check_no_disk_offload,
    context_attention_layers,
    detach_context_module,
    lora_detached,
    on_device,
)
from .loader import ContextAdapterLoaderMixin
from .lora import LORA_ADAPTER


__all__ = [
    "LORA_ADAPTER",
    "ContextAdapterLoaderMixin",
    "add_context_tokens",
    "attach_context_module",
    "attached_adapter",
    "attached_context_module",
    "check_no_disk_offload",
    "context_attention_layers",
    "detach_context_module",
    "lora_detached",
    "on_device",
]
