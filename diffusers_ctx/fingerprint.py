"""A fingerprint of content: equal for equal content, on every machine and in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def fingerprint(*parts: Any) -> str:
    """A short hash of all the parts, in order.

    Args:
        parts: models (the names, types and values in their state), tensors, arrays, bytes, paths of files (their
            content), and mappings, sequences and settings that `repr` describes, such as names and numbers. The order
            of a mapping's keys has no influence.

    Returns:
        32 hexadecimal digits.

    Raises:
        TypeError: if a part is of another type, whose `repr` might differ between equal parts.
    """
    return _digest(parts).hex()[:32]


def _digest(part: Any) -> bytes:
    """Hashes a part together with its type; containers hash the digests of what they hold."""
    if isinstance(part, torch.nn.Module):
        part = part.state_dict()
    if isinstance(part, torch.Tensor):
        part = part.detach().cpu()
        kind, content = f"tensor {part.dtype} {tuple(part.shape)}", _bytes_of(part)
    elif isinstance(part, np.ndarray):
        kind, content = f"array {part.dtype} {part.shape}", np.ascontiguousarray(part).tobytes()
    elif isinstance(part, bytes):
        kind, content = "bytes", part
    elif isinstance(part, Path):
        kind, content = "bytes", part.read_bytes()
    elif isinstance(part, Mapping):
        items = sorted(_digest(name) + _digest(value) for name, value in part.items())
        kind, content = "mapping", b"".join(items)
    elif isinstance(part, str | int | float | bool | torch.dtype | None):
        kind, content = type(part).__name__, repr(part).encode()
    elif isinstance(part, Sequence):
        kind, content = "sequence", b"".join(map(_digest, part))
    else:
        raise TypeError(f"{type(part).__name__} has no fingerprint; pass what it consists of.")
    return hashlib.sha256(f"{kind}\n".encode() + content).digest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's values; NumPy has no bfloat16, whose bytes are taken as they are."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
