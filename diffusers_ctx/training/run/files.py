"""Files that several processes share, and that a run may die while writing."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from filelock import FileLock, Timeout
from safetensors import SafetensorError


logger = logging.getLogger(__name__)

_LOCK = ".training.lock"
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


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs from training in the folder meanwhile; what a run that died held is free.

    Trainers of one process share it: a notebook may make them one after the other. Where the file system cannot lock,
    a warning says so, and nothing is kept away.

    Raises:
        OSError: if another run is training there.
    """
    file = folder.resolve() / _LOCK
    # not the soft one, which those who died still hold
    lock = FileLock(file, blocking=False, thread_local=False, is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(
            f"Another run is training in {folder}{_holder(file)}; wait for it, stop it, or choose another"
            " `output_dir`."
        ) from error
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run trains in it.")
    try:
        if lock.is_locked:
            with suppress(OSError):  # Windows locks the content too
                file.write_text(f"process {os.getpid()} of {socket.gethostname()}")
        yield
    finally:
        if lock.lock_counter <= 1:  # no other trainer of this process
            with suppress(OSError):  # Windows removes nothing that is open
                file.unlink()
        lock.release()


def _holder(file: Path) -> str:
    """Who has said in the lock's file that they hold it, in brackets; nothing if that cannot be told."""
    with suppress(OSError):
        if holder := file.read_text():
            return f" ({holder})"
    return ""


def check_room(folder: Path, size: int) -> None:
    """Checks that so many bytes of what is encoded fit into the folder of `cache_dir`.

    Raises:
        OSError: if they do not.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(
            f"`cache_dir` {folder} has {free / 1e9:.1f} GB free, and what is encoded takes {size / 1e9:.1f} GB; free"
            " some, choose another `cache_dir`, or leave out `cache_latents`."
        )


@contextmanager
def writing_to_cache(file: Path) -> Iterator[None]:
    """Says what to do where a file of `cache_dir` cannot be written.

    Raises:
        OSError: if so.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # a full disk is both, by what writes
        raise OSError(
            f"{file} could not be written ({error}). If the disk is full, free some of it, choose another `cache_dir`,"
            " or leave out `cache_latents`."
        ) from error


def atomic_write(file: Path, write: Callable[[Path], None]) -> None:
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
