from .attaching import attach_context_module, context_attention_layers
from .attention_maps import AttentionMaps, collect_attention
from .backbones import backbone_of, backbone_of_pipeline, native_resolution
from .copying import copy_adapter, copy_what_was_trained
from .lora_layers import LORA_ADAPTER, lora_detached
from .saving import ContextAdapterMixin
from .scheduler import set_context_scheduler


__all__ = [
    "LORA_ADAPTER",
    "AttentionMaps",
    "ContextAdapterMixin",
    "attach_context_module",
    "backbone_of",
    "backbone_of_pipeline",
    "collect_attention",
    "context_attention_layers",
    "copy_adapter",
    "copy_what_was_trained",
    "lora_detached",
    "native_resolution",
    "set_context_scheduler",
]
