"""Captions of a folder's images, from the metadata file beside them."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from .contexts import listed


_FILES = ("metadata.csv", "metadata.jsonl")


def read_captions(folder: Path, images: list[Path], text_column: str) -> dict[Path, str]:
    """Captions by image, from the folder's metadata file if it has one; warns if it lacks some images.

    Args:
        folder: the folder of a context.
        images: its images.
        text_column: the column of captions.

    Raises:
        ValueError: if the file cannot be read, lacks a column, names an image twice or one that is not there, or if
            captions lie in text files, which are not read.
    """
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if not files:
        _check_no_text_files(images)
        return {}
    if len(files) > 1:
        raise ValueError(f"{folder} has both {files[0].name} and {files[1].name}; keep one.")
    entries = _read_metadata(files[0])
    lacking = [name for name in ("file_name", text_column) if any(name not in entry for entry in entries)]
    if lacking:
        raise ValueError(
            f"{files[0]} lacks {lacking} (it has {list(entries[0])}); add them, or name the captions with "
            "`text_column` (`--caption_column`)."
        )
    for row, entry in enumerate(entries, start=1):
        name, caption = entry["file_name"], entry[text_column]
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise ValueError(f"Row {row} of {files[0]} has the image {name!r} and the caption {caption!r}, not texts.")
    named = [folder / entry["file_name"] for entry in entries]
    repeated = sorted(path.name for path, count in Counter(named).items() if count > 1)
    if repeated:
        raise ValueError(f"{files[0]} names images more than once: {listed(repeated)}; keep one caption of each.")
    captions = {path: entry[text_column] or "" for path, entry in zip(named, entries)}
    unknown = sorted(captions.keys() - set(images))
    if unknown:
        raise ValueError(f"{files[0]} names images that are not there: {listed(list(map(str, unknown)))}; correct it.")
    without = [path.name for path in images if path not in captions]
    if without:
        warnings.warn(
            f"{len(without)} of {len(images)} images have no caption in {files[0]}, and so an empty one: "
            f"{listed(without)}.",
            stacklevel=4,
        )
    return captions


def check_root(root: Path) -> None:
    """Checks that no metadata file lies next to the contexts' folders, where it is not read.

    Raises:
        ValueError: if one does.
    """
    for name in _FILES:
        if (root / name).exists():
            raise ValueError(
                f"{root / name} lies beside the contexts' folders, where it is not read; write one into each context's"
                " folder, with the names of its files."
            )


def _check_no_text_files(images: list[Path]) -> None:
    texts = [text for text in (path.with_suffix(".txt") for path in images) if text.exists()]
    if texts:
        raise ValueError(
            f"Text files beside images are not read as captions: {listed(list(map(str, texts)))}; write captions into"
            f" {texts[0].with_name('metadata.csv')} (file_name,text), or remove the files to train without."
        )


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            if file.suffix == ".csv":
                entries: list[dict[str, Any]] = list(csv.DictReader(lines))
            else:
                entries = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, csv.Error) as error:
        form = "as comma-separated values" if file.suffix == ".csv" else "one JSON object a line"
        raise ValueError(f"{file} cannot be read ({error}); write it in UTF-8, {form}.") from error
    if not entries:
        raise ValueError(f"{file} names no image; fill it, or remove it to train without captions.")
    for row, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"Row {row} of {file} is {entry!r}; write one JSON object a line.")
    if file.suffix == ".csv":
        _check_fields(file, entries)
    return entries


def _check_fields(file: Path, entries: list[dict[str, Any]]) -> None:
    """Checks that each row has as many fields as the header. The reader puts surplus fields under the key `None`, and
    the value `None` for missing ones."""
    for row, entry in enumerate(entries, start=1):
        if None in entry or None in entry.values():
            raise ValueError(
                f"Row {row} of {file} has {'more' if None in entry else 'fewer'} fields than the header names columns"
                f" ({list(entry.values())}); put captions that have a comma in double quotes."
            )
