"""Adapters on the Hub: finding and pushing them, and their model cards."""

from .download import resolve_adapter_folder
from .model_card import pipeline_name, render_model_card, save_model_card, with_usage_of
from .push import create_repository, push_adapter_folder


__all__ = [
    "create_repository",
    "pipeline_name",
    "push_adapter_folder",
    "render_model_card",
    "resolve_adapter_folder",
    "save_model_card",
    "with_usage_of",
]
