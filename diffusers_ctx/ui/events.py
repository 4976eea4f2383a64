"""What all work that visitors ask for has in common: a queue, progress, errors in words."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from .studio import OnStep


PRIVATE: dict[str, Any] = {"api_visibility": "private"}
"""An event that is no endpoint of an API."""

QUEUED: dict[str, Any] = PRIVATE | {"concurrency_id": "pipeline", "concurrency_limit": 1}
"""An event that waits for its turn: pictures are drawn one after the other, for all visitors."""


@contextmanager
def in_words(if_memory_is_full: str = "Draw fewer images at once.") -> Iterator[None]:
    """Shows what is wrong with what a visitor gave, in the library's words; other errors are bugs, and stay.

    Args:
        if_memory_is_full: what to do when the GPU has too little memory.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise _shown(f"The GPU has too little memory for this. {if_memory_is_full}") from error
    except (ValueError, OSError, ImportError) as error:
        raise _shown(str(error)) from error


def on_step(progress: gr.Progress) -> OnStep:
    """Shows steps as a bar on the page."""
    return lambda done, total: progress((done, total), desc="Drawing", unit="steps")


def _shown(message: str) -> gr.Error:
    return gr.Error(html.escape(message, quote=False), print_exception=False)
