"""Adapters on the Hub and on disk: finding and checking them, their model cards, and pushing them."""

from .model_card import pipeline_name, render_model_card, save_model_card
from .push import create_repository, push_adapter_folder
from .validation import (
    CARD_NAME,
    CONFIG_NAME,
    FORMAT_VERSION,
    INJECTIONS,
    LIBRARY,
    LORA_WEIGHTS_NAME,
    MODES,
    MODULE_FOLDER,
    RECORD_NAME,
    WEIGHTS_NAME,
    AdapterError,
    read_adapter_config,
    resolve_adapter_folder,
    validate_adapter_folder,
)


__all__ = [
    "CARD_NAME",
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "INJECTIONS",
    "LIBRARY",
    "LORA_WEIGHTS_NAME",
    "MODES",
    "MODULE_FOLDER",
    "RECORD_NAME",
    "WEIGHTS_NAME",
    "AdapterError",
    "create_repository",
    "pipeline_name",
    "push_adapter_folder",
    "read_adapter_config",
    "render_model_card",
    "resolve_adapter_folder",
    "save_model_card",
    "validate_adapter_folder",
]
