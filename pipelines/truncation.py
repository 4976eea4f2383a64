"""Captions that are longer than the text encoders take: counted once, and not warned of whenever they are encoded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers_ctx.adapter.text_encoders import tokenizer_of

from .conditioning import Conditioner


_WARNINGS = ("input was truncated because", "Token indices sequence length is longer")  # diffusers, transformers


def describe_truncated(pipeline: Any, captions: Sequence[str], what: str = "captions") -> str | None:
    """A line about the captions of which a text encoder of the pipeline takes a part only; `None` if it takes all.

    Args:
        pipeline: a [`ComposablePipeline`] or one of another family.
        captions: the captions; empty ones do not count.
        what: what the line calls them.
    """
    captions = [caption for caption in captions if caption]
    distinct = sorted(set(captions))
    limits = Conditioner.of(pipeline).decisive_limits
    too_long: set[str] = set()
    with truncation_unsaid(pipeline):
        for name, limit in limits.items() if distinct else []:
            lengths = map(len, pipeline.components[tokenizer_of(name)](distinct).input_ids)
            too_long |= {caption for caption, length in zip(distinct, lengths) if length > limit}
    if not too_long:
        return None
    number = sum(caption in too_long for caption in captions)
    return (
        f"{number} of {len(captions)} {what} are longer than the {min(limits.values())} tokens that the text encoder"
        " takes; the rest is cut off."
    )


@contextmanager
def truncation_unsaid(pipeline: Any) -> Iterator[None]:
    """Within the `with` block the libraries do not warn of captions that are too long, with their text each time."""
    names = (type(pipeline).encode_prompt.__module__, "transformers.tokenization_utils_base")
    loggers = [logging.getLogger(name) for name in names]

    def is_of_use(record: logging.LogRecord) -> bool:
        return not any(warning in record.getMessage() for warning in _WARNINGS)

    for logger in loggers:
        logger.addFilter(is_of_use)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_use)
