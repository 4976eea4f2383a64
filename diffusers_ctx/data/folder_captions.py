"""Captions of a folder's images, from the metadata files and text files beside them."""

from __future__ import annotations

import csv
import json
import unicodedata
import warnings
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .contexts import listed
from .folder_scan import CAPTION, FolderScan


def read_captions(folder: Path, found: FolderScan, text_column: str) -> dict[Path, str]:
    """Captions by image, from metadata files and text files; warns if there are some, but not for all images.

    Args:
        folder: the folder of a context.
        found: its files. Text files that belong to no image are moved to those that are passed over.
        text_column: the column of captions.

    Raises:
        ValueError: if a file cannot be read, lacks a column, names an image that is not there, or an image has two
            captions; or if captions lie in `.txt` files, which are not read.
    """
    texts = [file for file in found.captions if file.suffix.lower() == CAPTION]
    metadata = [file for file in found.captions if file not in texts]
    if not found.captions:
        _check_no_text_files(found)
        return {}
    captions = _captions_beside(texts, found)
    _check_one_each(metadata)
    for file in metadata:
        rows = _captions_in(file, found, text_column)
        if repeated := sorted(path.name for path in rows.keys() & captions.keys()):
            raise ValueError(
                f"{file} names images that have a caption elsewhere: {listed(repeated)}; keep one of each."
            )
        captions |= rows
    without = [path.name for path in found.images if path not in captions]
    if captions and without:
        source = metadata[0] if len(found.captions) == 1 and metadata else folder
        warnings.warn(
            f"{len(without)} of {len(found.images)} images have no caption in {source}, and so an empty one: "
            f"{listed(without)}.",
            stacklevel=5,
        )
    return captions


def check_root(captions: list[Path]) -> None:
    """Checks that no captions lie next to the contexts' folders, where they are not read.

    Raises:
        ValueError: if some do.
    """
    if captions:
        raise ValueError(
            f"{captions[0]} lies beside the contexts' folders, where it is not read; write one into each context's"
            " folder, with the names of its files."
        )


def _check_no_text_files(found: FolderScan) -> None:
    images = {path.with_suffix("") for path in found.images}
    texts = [path for kind, path in found.passed_over if kind == ".txt" and path.with_suffix("") in images]
    if texts:
        raise ValueError(
            f"Text files beside images are not read as captions: {listed(list(map(str, texts)))}; write captions into"
            f" {texts[0].with_name('metadata.csv')} (file_name,text) or name the files `{CAPTION}`, or remove the"
            " files to train without."
        )


def _check_one_each(metadata: list[Path]) -> None:
    for folder, grouped in groupby(metadata, key=lambda file: file.parent):
        if len(files := list(grouped)) > 1:
            raise ValueError(f"{folder} has both {files[0].name} and {files[1].name}; keep one.")


def _captions_beside(texts: list[Path], found: FolderScan) -> dict[Path, str]:
    """Captions from text files that have their image's name."""
    images: dict[str, list[Path]] = {}
    for image in found.images:
        images.setdefault(_key(image.with_suffix("")), []).append(image)
    captions: dict[Path, str] = {}
    for file in texts:
        named = images.get(_key(file.with_suffix("")), [])
        if not named:
            found.passed_over.append((CAPTION, file))
            continue
        try:
            caption = file.read_text(encoding="utf-8-sig").strip()
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}); write it in UTF-8.") from error
        captions |= dict.fromkeys(named, caption)
    return captions


def _captions_in(file: Path, found: FolderScan, text_column: str) -> dict[Path, str]:
    """Captions from a metadata file, which names images relative to its own folder; not of files passed over."""
    entries = _read_metadata(file)
    lacking = [name for name in ("file_name", text_column) if any(name not in entry for entry in entries)]
    if lacking:
        raise ValueError(
            f"{file} lacks {lacking} (it has {list(entries[0])}); add them, or name the captions with "
            "`text_column` (`--caption_column`)."
        )
    for row, entry in enumerate(entries, start=1):
        name, caption = entry["file_name"], entry[text_column]
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise ValueError(f"Row {row} of {file} has the image {name!r} and the caption {caption!r}, not texts.")
    known = {_key(image): image for image in found.images} | {str(image): image for image in found.images}
    named = [file.parent / entry["file_name"] for entry in entries]
    named = [known.get(str(path)) or known.get(_key(path), path) for path in named]
    repeated = sorted(path.name for path, count in Counter(named).items() if count > 1)
    if repeated:
        raise ValueError(f"{file} names images more than once: {listed(repeated)}; keep one caption of each.")
    passed_over = {_key(path) for _, path in found.passed_over}
    unknown = sorted(path for path in set(named) - set(found.images) if _key(path) not in passed_over)
    if unknown:
        raise ValueError(f"{file} names images that are not there: {listed(list(map(str, unknown)))}; correct it.")
    captions = {path: entry[text_column] or "" for path, entry in zip(named, entries)}
    return {path: captions[path] for path in found.images if path in captions}


def _key(path: Path) -> str:
    """Names are written in two Unicode forms, and file systems may change the form."""
    return unicodedata.normalize("NFC", str(path))


def _read_metadata(file: Path) -> list[dict[str, Any]]:
    form = _FORMS[file.suffix.lower()]
    try:
        entries = _read_entries(file)
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"{file} cannot be read ({error}); write it {form}.") from error
    if not entries:
        raise ValueError(f"{file} names no image; fill it, or remove it to train without captions.")
    for row, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"Row {row} of {file} is {entry!r}; write one JSON object a line.")
    if file.suffix.lower() == ".csv":
        _check_fields(file, entries)
    return entries


_FORMS = {
    ".csv": "in UTF-8, as comma-separated values",
    ".jsonl": "in UTF-8, one JSON object a line",
    ".parquet": "as a Parquet table",
}


def _read_entries(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    with file.open(newline="", encoding="utf-8-sig") as lines:
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(lines))
        return [json.loads(line) for line in lines if line.strip()]


def _check_fields(file: Path, entries: list[dict[str, Any]]) -> None:
    """Checks that each row has as many fields as the header. The reader puts surplus fields under the key `None`, and
    the value `None` for missing ones."""
    for row, entry in enumerate(entries, start=1):
        if None in entry or None in entry.values():
            raise ValueError(
                f"Row {row} of {file} has {'more' if None in entry else 'fewer'} fields than the header names columns"
                f" ({list(entry.values())}); put captions that have a comma in double quotes."
            )
