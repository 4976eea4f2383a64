"""Images of an evaluation, on disk: a run that was stopped continues where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm


@dataclass
class ImageJob:
    """Images to make.

    Attributes:
        folder: folder of the images; image `i` is `<i>.png`.
        n: their number.
        produce: maps indices below `n` to images (number of indices, H, W, 3) uint8, each a function of its index.
    """

    folder: Path
    n: int
    produce: Callable[[list[int]], np.ndarray]

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.png"

    def images(self) -> np.ndarray:
        """All images (n, H, W, 3) uint8, once they are made."""
        return np.stack([np.asarray(Image.open(self.path(index))) for index in range(self.n)])


def make_images(jobs: Sequence[ImageJob], batch_size: int, accelerator: Accelerator, description: str) -> None:
    """Makes the images that are not on disk yet, or damaged, shared among the processes; returns when all are there.

    Batches do not depend on what is missing or on the number of processes, and a batch that lacks an image is made
    again as a whole: the images of another batch would differ in the last bit.

    Args:
        jobs: the images to make.
        batch_size: images made at once by a process.
        accelerator: knows the processes, which all call this function and see the same disk.
        description: label of the progress bar.
    """
    starts = [(job, start) for job in jobs for start in range(0, job.n, batch_size)]
    batches = [(job, list(range(start, min(start + batch_size, job.n)))) for job, start in starts]
    missing = [(job, batch) for job, batch in batches if not all(_is_whole(job.path(index)) for index in batch)]
    accelerator.wait_for_everyone()  # or one process would not list what another one has already made
    share = missing[accelerator.process_index :: accelerator.num_processes]
    for job, batch in tqdm(share, desc=description, disable=not accelerator.is_main_process):
        job.folder.mkdir(parents=True, exist_ok=True)
        for index, image in zip(batch, job.produce(batch)):
            _save_atomically(image, job.path(index))
    accelerator.wait_for_everyone()


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Checks that the images in a folder, if there are any, were made with these settings.

    Raises:
        ValueError: if they were not, with what differs, or if the folder has no settings.
    """
    if not folder.exists() or not any(folder.rglob("*.png")):
        return
    file = folder / "settings.json"
    if not file.exists():
        raise ValueError(
            f"{folder} holds images and no {file.name} that says how they were made; choose another folder."
        )
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); choose another folder, or delete {folder}.") from error
    different = [
        f"`{name}` was {found.get(name)!r} and is {settings.get(name)!r}"
        for name in found | settings
        if found.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds images that were made with other settings: {'; '.join(different)}. Go back to those"
            f" settings, choose another folder, or delete {folder}."
        )


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings that `check_settings` compares with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _is_whole(path: Path) -> bool:
    """Whether the image is there and can be read to its end."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # what a cut-off file is for Pillow
        return False
    return True


def _save_atomically(image: np.ndarray, path: Path) -> None:
    """Under another name first: a run that dies while writing leaves no broken image."""
    unfinished = path.with_suffix(".unfinished")
    Image.fromarray(image).save(unfinished, format="PNG")
    os.replace(unfinished, path)
