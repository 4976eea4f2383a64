"""Locks and atomic writes."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from filelock import FileLock, Timeout
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

_LOCK = ".training.lock"
_POLLING_SECONDS = 0.5


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Creates the folder that an option names, if need be, and checks that it can be written to.

    Raises:
        OSError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"`{option}` {folder} cannot be written to ({error.strerror}); choose another.") from error


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs from training in the folder; the lock of a run that died is free.

    Trainers of one process share it, since a notebook may make them one after the other. On a file system that cannot
    lock, there is a warning and no protection.

    Raises:
        OSError: if another run is training in the folder.
    """
    file = folder.resolve() / _LOCK
    # not the soft lock, which outlives a process that died
    lock = FileLock(file, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(
            f"Another run is training in {folder}; wait for it, stop it, or choose another `output_dir`."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): make sure that no other run trains in it.")
    try:
        yield
    finally:
        if lock.lock_counter <= 1:  # no other trainer of this process
            with suppress(OSError):  # Windows does not remove open files
                file.unlink()
        lock.release()


def check_room(folder: Path, size: int) -> None:
    """Checks that the cache of encoded data, of `size` bytes, fits into the folder.

    Raises:
        OSError: if it does not.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(
            f"`cache_dir` {folder} has {free / 1e9:.1f} GB free, and encoded data takes {size / 1e9:.1f} GB; free"
            " some, choose another `cache_dir`, or leave out `cache_latents`."
        )


@contextmanager
def writing_to_cache(file: Path) -> Iterator[None]:
    """Raises `OSError` with a fix if a file of `cache_dir` cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # what a full disk raises depends on the writer
        raise OSError(
            f"{file} could not be written ({error}). If the disk is full, free some of it, choose another `cache_dir`,"
            " or leave out `cache_latents`."
        ) from error


def atomic_write(file: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` write the file under another name, and renames it when it is complete and on the disk."""
    with TemporaryDirectory(prefix="unfinished-", dir=file.parent) as folder:
        unfinished = Path(folder) / file.name
        write(unfinished)
        flush(unfinished)
        os.replace(unfinished, file)


def flush(file: Path) -> None:
    """Waits until the disk has the file: after a power failure, a name may be there without its content."""
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def needs_making(file: Path, is_whole: Callable[[], bool]) -> bool:
    """Whether a file of a cache is not there, or has to be made anew because it is damaged, which a warning says."""
    if not file.exists():
        return True
    if is_whole():
        return False
    logger.warning(f"{file} is damaged and is made anew.")
    return True


def wait_for_file(file: Path, is_whole: Callable[[], bool]) -> None:
    """Waits until another process of this machine has written the file, without the time limit of a collective.

    If that process fails, the launcher ends this one.
    """
    while not (file.exists() and is_whole()):
        time.sleep(_POLLING_SECONDS)
