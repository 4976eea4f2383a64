"""What the checks know of each image: read once, and small enough to keep for all."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, Image

from ...data.contexts import listed
from ...data.encoded_images import read_image


THUMBNAIL = 32  # pixels, height and width


@dataclass(frozen=True)
class ImageTable:
    """Images in contexts, a row for each.

    Attributes:
        contexts: the context of each image (n,).
        captions: its caption, empty where there is none.
        paths: its file's path within the context's folder; `None` where it does not come from a file.
        sizes: width and height in pixels (n, 2).
        digests: a hash of its pixels.
        thumbnails: the image at 32 x 32 pixels (n, 32, 32, 3), uint8.
    """

    contexts: np.ndarray
    captions: list[str]
    paths: list[PurePath | None]
    sizes: np.ndarray
    digests: list[str]
    thumbnails: np.ndarray

    def rows(self, context: str) -> np.ndarray:
        """Rows of a context, in order."""
        return np.flatnonzero(self.contexts == context)

    @property
    def names(self) -> list[str]:
        """The contexts, sorted."""
        return sorted(set(self.contexts.tolist()))

    def shown(self, rows: Any) -> str:
        """Some images for a message."""
        return listed([f"{self.contexts[row]}/{self.paths[row] or f'row {row}'}" for row in rows])


def read_images(dataset: Dataset, root: Path | None) -> ImageTable:
    """Reads a dataset of [`load_context_dataset`]; `root` is the folder of contexts, if it comes from one."""
    encoded = dataset.cast_column("image", Image(decode=False))
    contexts = list(dataset["context"])
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        read = list(pool.map(lambda row: _read(encoded[row]["image"]), range(len(encoded))))
    paths, sizes, digests, thumbnails = zip(*read)
    return ImageTable(
        contexts=np.array(contexts),
        captions=list(dataset["text"]),
        paths=[_within_context(path, root) for path in paths],
        sizes=np.array(sizes),
        digests=list(digests),
        thumbnails=np.stack(thumbnails),
    )


def _read(image: dict[str, Any]) -> tuple[str | None, tuple[int, int], str, np.ndarray]:
    """Path, size, digest and thumbnail of an encoded image."""
    picture, _ = read_image(image)
    digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    thumbnail = picture.resize((THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.BOX, reducing_gap=2)
    return image["path"], picture.size, digest, np.asarray(thumbnail)


def _within_context(path: str | None, root: Path | None) -> PurePath | None:
    if path is None:
        return None
    if root is None or not PurePath(path).is_relative_to(root):  # of a table of images
        return PurePath(path)
    return PurePath(*PurePath(path).relative_to(root).parts[1:])
