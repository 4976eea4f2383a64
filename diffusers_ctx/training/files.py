"""Files that several processes share, and that a run may die while writing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile


_SECONDS_BETWEEN_LOOKS = 0.5


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Makes the folder, which an option names, if need be, and checks that files can be written to it.

    Raises:
        OSError: if they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"`{option}` {folder} cannot be written to ({error.strerror}); choose another.") from error


def write_whole(file: Path, write: Callable[[Path], None]) -> None:
    """Has `write` write a file under another name; it takes its own when it is whole and on the disk."""
    with TemporaryDirectory(prefix="unfinished-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        write(unfinished)
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, file)


def wait_for_file(file: Path) -> None:
    """Until another process of this machine has written it, however long that takes: a collective would time out.

    Where that process fails, the launcher ends this one.
    """
    while not file.exists():
        time.sleep(_SECONDS_BETWEEN_LOOKS)
