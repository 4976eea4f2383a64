"""A cache of latents on disk, keyed by the content of everything that they are encoded from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ...fingerprint import fingerprint
from ..run.files import atomic_write, check_room, check_writable, wait_for_file, writing_to_cache


Latents = dict[str, torch.Tensor]


def content_key(vae: AutoencoderKL, dataset: datasets.Dataset, *settings: object) -> str:
    """The fingerprint of the VAE, of the content of the images' files, in order, and of the settings.

    Args:
        vae: what encodes the images.
        dataset: has a column `image`.
        settings: what else the latents depend on.
    """
    rows = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
    files = (row["image"] for row in rows)
    images = [fingerprint(Path(file["path"]) if file["bytes"] is None else file["bytes"]) for file in files]
    return fingerprint(vae, images, settings)


def cached(
    folder: Path, key: str, encode: Callable[[], Latents], wait_for_other_process: bool = False, size: int = 0
) -> Latents:
    """Reads what the folder has under the key, or calls `encode` and keeps what it returns.

    Several processes may call it at once: each writes a file of its own and then renames it.

    Args:
        folder: the cache.
        key: names the file; see `content_key`.
        encode: makes what is not there yet.
        wait_for_other_process: wait until another process has written it, instead of encoding.
        size: bytes that the folder needs room for.

    Raises:
        OSError: if the folder cannot be written to or has no room, before anything is encoded; or if the file cannot
            be written.
    """
    file = folder / f"latents-{key}.safetensors"
    if wait_for_other_process:
        wait_for_file(file)
    elif not file.exists():
        check_writable(folder, "cache_dir")  # before the images are encoded
        check_room(folder, size)
        latents = encode()
        with writing_to_cache(file):
            atomic_write(file, lambda unfinished: save_file(latents, unfinished))
    return load_file(file)
