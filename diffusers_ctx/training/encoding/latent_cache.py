"""A cache of latents on disk, keyed by the content of everything that they are encoded from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ...fingerprint import fingerprint
from ..run.files import atomic_write, check_room, check_writable, needs_making, wait_for_file, writing_to_cache


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
    folder: Path,
    key: str,
    encode: Callable[[], Latents],
    wait_for_other_process: bool = False,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Latents:
    """Reads what the folder has under the key, or calls `encode` and keeps what it returns; also where a file that is
    damaged, or of other tensors, is in its place.

    Several processes may call it at once: each writes a file of its own and then renames it.

    Args:
        folder: the cache.
        key: names the file; see `content_key`.
        encode: makes what is not there yet.
        wait_for_other_process: wait until another process has written it, instead of encoding.
        shapes: the shapes of what `encode` makes, by name, of about four bytes a number; without them, neither the
            content of a file nor the room for it is checked.

    Raises:
        OSError: if the folder cannot be written to or has no room, before anything is encoded; or if the file cannot
            be written.
    """
    file = folder / f"latents-{key}.safetensors"
    if wait_for_other_process:
        wait_for_file(file, lambda: _is_whole(file, shapes))
    elif needs_making(file, lambda: _is_whole(file, shapes)):
        check_writable(folder, "cache_dir")  # before the images are encoded
        check_room(folder, 4 * sum(map(math.prod, (shapes or {}).values())))
        latents = encode()
        with writing_to_cache(file):
            atomic_write(file, lambda unfinished: save_file(latents, unfinished))
    return load_file(file)


def _is_whole(file: Path, shapes: Mapping[str, Sequence[int]] | None) -> bool:
    """Whether the file is as long as its header says, and holds tensors of these shapes, if there are any."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, OSError):
        return False
    return shapes is None or found == {name: tuple(shape) for name, shape in shapes.items()}
