"""Latents on disk, found again by the content of all that they were encoded from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ..run.files import atomic_write, check_room, check_writable, wait_for_file, writing_to_cache


Latents = dict[str, torch.Tensor]


def content_key(vae: AutoencoderKL, dataset: datasets.Dataset, *settings: object) -> str:
    """A digest of the images' files, in their order, of the VAE's weights and of the settings' `repr`.

    Args:
        vae: what encodes them.
        dataset: has a column `image`.
        settings: what else the latents depend on.
    """
    digest = hashlib.sha256(repr((settings, vae.dtype)).encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    for row in dataset.select_columns("image").cast_column("image", datasets.Image(decode=False)):
        content = row["image"]["bytes"]
        digest.update(hashlib.sha256(Path(row["image"]["path"]).read_bytes() if content is None else content).digest())
    return digest.hexdigest()[:32]


def cached(
    folder: Path, key: str, encode: Callable[[], Latents], wait_for_other_process: bool = False, size: int = 0
) -> Latents:
    """What is in the folder under that key, and otherwise what `encode` returns, which is kept there.

    Safe under several processes: each writes a file of its own, which takes its name when it is whole. With
    `wait_for_other_process`, what is not there yet is waited for.

    Raises:
        OSError: if the folder cannot be written to, or has no room for `size` bytes; nothing has been encoded then. If
            what was encoded cannot be written, too.
    """
    file = folder / f"latents-{key}.safetensors"
    if wait_for_other_process:
        wait_for_file(file)
    elif not file.exists():
        check_writable(folder, "cache_dir")  # and not only when all is encoded
        check_room(folder, size)
        latents = encode()
        with writing_to_cache(file):
            atomic_write(file, lambda unfinished: save_file(latents, unfinished))
    return load_file(file)
