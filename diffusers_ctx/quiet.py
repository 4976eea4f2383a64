"""Keeps one message of transformers off the console. Import it before diffusers.

Where torchvision is missing, transformers says for every image processor that diffusers imports that it falls back to
PIL. Nothing here needs torchvision, and nobody can act on the message.
"""

from __future__ import annotations

import logging


def _is_of_use(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()


logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_use)
