"""Random numbers keyed by what they are for, and by nothing that was drawn before.

A key begins with the run's seed and the name of a stream, such as `(seed, "diffusion", step)`: streams never share
numbers, and whoever knows the key draws the same ones again.
"""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(*key: int | str) -> int:
    """A seed in [0, 2^63) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU, since each kind of device has random numbers of its own."""
    return torch.Generator().manual_seed(keyed_seed(*key))
