"""Paths that users give, and names that are folders or repositories on the Hub."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path


_LISTED = 5


def expand_home(name: str) -> str:
    """A path or name, with home folders in place of `~` and `~user`: a shell leaves them in `--flag=~/photos`.

    Raises:
        ValueError: if there is no such user.
    """
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError as error:
        raise ValueError(f"'{name}' names no user's home folder; write './{name}' for a folder here.") from error


def local_path(path: str | os.PathLike) -> Path:
    """The path, see [`expand_home`]."""
    return Path(expand_home(os.fspath(path)))


def existing_folder(path: str | os.PathLike) -> Path:
    """The path of a folder.

    Raises:
        FileNotFoundError: if there is none, with the nearest names that exist.
        NotADirectoryError: if it is a file.
        ValueError: if it names the home folder of an unknown user.
    """
    folder = local_path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"'{path}' is a file; give a folder.")
    raise FileNotFoundError(f"There is no folder '{path}'; check the path: {_alternatives(folder)}")


def local_or_hub(name: str | os.PathLike, has_owner: bool = False) -> str:
    """A folder's path, or the id of a repository on the Hub. A mistyped path does not wait for the network.

    What is no folder is taken for an id, unless it cannot be one, its parent folder exists, or a folder here has
    nearly the same name.

    Args:
        name: the path or id.
        has_owner: whether ids are always `owner/name`, and never a name alone, as those of some old models are.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `existing_folder`, for what is not taken for an id.
    """
    text = expand_home(os.fspath(name))
    if Path(text).exists() or not _has_form_of_id(text):
        existing_folder(text)
        return text
    owner, slash, _ = text.partition("/")
    try:
        if Path(owner).is_dir() if slash else has_owner or _similar(Path(text)):
            existing_folder(text)
    except FileNotFoundError as error:
        way = f"start outside of the folder that has '{owner}'" if slash else "write owner/name"
        raise FileNotFoundError(f"{error} For a repository on the Hub, {way}.") from error
    return text


def _has_form_of_id(name: str) -> bool:
    """Whether it is `name` or `owner/name`, as repositories on the Hub are called."""
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and "\\" not in name


def _alternatives(path: Path) -> str:
    """What there is instead of a path that does not exist, as the end of a message."""
    while not path.parent.exists():
        path = path.parent
    if similar := _similar(path):
        return f"did you mean '{similar}'?"
    names = _folders(path.parent)
    shown = ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")
    return f"the folders in '{path.parent}' are {shown}." if names else f"there are no folders in '{path.parent}'."


def _similar(path: Path) -> Path | None:
    """A folder beside the path, of nearly the same name."""
    near = get_close_matches(path.name, _folders(path.parent), n=1, cutoff=0.75)
    return path.parent / near[0] if near else None


def _folders(parent: Path) -> list[str]:
    """The names of the folders in a folder, if it can be read."""
    try:
        return sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
