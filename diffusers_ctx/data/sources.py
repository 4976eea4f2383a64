"""Sources of images in contexts: a folder with one sub-folder per context, or a dataset with columns."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset

from ..paths import existing_folder, local_or_hub, local_path
from .contexts import listed
from .folder_captions import check_root, read_captions


_DEFAULT_TEXT_COLUMN = "text"
_DATA_FILES = {".parquet", ".arrow", ".tar"}  # a folder that holds one of these is `datasets.load_dataset`'s to read


# A folder of contexts


def is_context_root(source: Any) -> bool:
    """Whether `source` is a folder of contexts, and not one that `datasets.load_dataset` reads."""
    if not isinstance(source, str | Path) or not local_path(source).is_dir():
        return False
    return not any(path.suffix in _DATA_FILES and path.stem != "metadata" for path in local_path(source).rglob("*"))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _images_among(root: Path, paths: Iterable[Path]) -> list[Path]:
    """The image files among paths under `root`, sorted; hidden files and folders are passed over."""
    extensions = {name for name, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in extensions and path.is_file() and not _is_hidden(path.relative_to(root))
    )


def context_folders(root: Path) -> list[str]:
    """The names of the sub-folders, which are the contexts.

    Raises:
        ValueError: if images or metadata files lie outside of them.
    """
    stray = _images_among(root, root.iterdir())
    if stray:
        raise ValueError(
            f"Images lie directly in {root}, so their context is unknown: {listed([path.name for path in stray])}. "
            "Move each into a sub-folder named after its context, such as 'obs'."
        )
    check_root(root)
    return [path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.relative_to(root))]


def read_folders(root: Path, contexts: list[str], text_column: str) -> Dataset:
    """The images in the sub-folders of these contexts, sorted by name, and their captions.

    `datasets.load_dataset("imagefolder", data_dir=...)` is not used, also not for each context alone: it drops images
    that a metadata file does not name, takes file names like `train_1.jpg` and `test_1.png` for splits and drops all
    other images, and takes a caption with a comma for two columns.

    Raises:
        ValueError: if a folder has no images or a wrong metadata file; see `read_captions`.
    """
    columns: dict[str, list[str]] = {"image": [], "context": [], "text": []}
    for context in contexts:
        folder = root / context
        images = _images_among(folder, folder.rglob("*"))
        if not images:
            raise ValueError(f"The folder {folder} holds no images; put the context's images there or remove it.")
        captions = read_captions(folder, images, text_column)
        columns["image"] += map(str, images)
        columns["context"] += [context] * len(images)
        columns["text"] += [captions.get(image, "") for image in images]
    features = Features({"image": Image(mode="RGB"), "context": Value("string"), "text": Value("string")})
    return Dataset.from_dict(columns, features=features)


# A dataset with columns


def load_source(
    source: str | Path, name: str | None, split: str, cache_dir: str | Path | None, streaming: bool = False
) -> Any:
    """A dataset of `datasets.load_dataset`, map-style or a stream; see `load_context_dataset` for what it raises."""
    if not isinstance(source, str | Path):
        raise TypeError(
            f"`source` is a {type(source).__name__}; give a folder, the name of a dataset, or one `datasets.Dataset` "
            "(of a DatasetDict, one split)."
        )
    source = str(existing_folder(source)) if isinstance(source, Path) else local_or_hub(source)
    try:
        cache = str(local_path(cache_dir)) if cache_dir else None
        return load_dataset(str(source), name, split=split, cache_dir=cache, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{str(source)!r} is no folder here, and `datasets.load_dataset` does not find it either ({error}); check "
            "the path or the name."
        ) from error
    except ValueError as error:  # no such configuration or split, or none given where there are several
        raise ValueError(
            f"{str(source)!r} cannot be loaded ({error}); choose with `dataset_config_name` and `dataset_split`."
        ) from error


def read_columns(table: Dataset, image_column: str, context_column: str, text_column: str) -> Dataset:
    """The table with exactly the columns `image`, `context` and `text`."""
    table = table.with_format(None)
    wanted = wanted_columns(table, image_column, context_column, text_column)
    contexts = _context_names(table, context_column)
    texts = _texts(table, text_column) if text_column in wanted else [""] * len(table)
    images = table.select_columns(image_column).rename_columns({image_column: "image"})
    return images.add_column("context", contexts).add_column("text", texts).cast_column("image", Image(mode="RGB"))


def wanted_columns(
    table: Dataset | IterableDataset, image_column: str, context_column: str, text_column: str
) -> list[str]:
    """The columns of images, of contexts and, if there are any, of captions; see `load_context_dataset`."""
    columns = table.column_names or []
    wanted = [image_column, context_column]
    if text_column in columns or text_column != _DEFAULT_TEXT_COLUMN:
        wanted.append(text_column)
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise ValueError(
            f"The dataset has no column {missing}, only {columns}; name its columns with `image_column`, "
            "`context_column` and `text_column` (`--caption_column`)."
        )
    if not isinstance(table.features[image_column], Image):
        raise ValueError(
            f"The column {image_column!r} holds {table.features[image_column]}, no images; cast it with "
            "`dataset.cast_column(name, datasets.Image())`."
        )
    return wanted


def _context_names(table: Dataset, column: str) -> list[str]:
    feature, values = table.features[column], list(table[column])
    if isinstance(feature, ClassLabel):
        return [feature.names[value] for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"Row {row} has {value!r} in the column {column!r}; give each row its context's name.")
    return values


def _texts(table: Dataset, column: str) -> list[str]:
    texts = ["" if value is None else value for value in table[column]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The column {column!r} holds {table.features[column]}; give one caption per image.")
    return texts
