"""A dataset with columns of images, contexts and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, IterableDataset, load_dataset

from ..context.names import normal_name
from ..paths import existing_folder, local_or_hub, local_path
from .encoded_images import RGBImage


_DEFAULT_TEXT_COLUMN = "text"


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
    return images.add_column("context", contexts).add_column("text", texts).cast_column("image", RGBImage())


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
        return [normal_name(feature.names[value]) for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(f"Row {row} has {value!r} in the column {column!r}; give each row its context's name.")
    return list(map(normal_name, values))


def _texts(table: Dataset, column: str) -> list[str]:
    texts = ["" if value is None else value for value in table[column]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The column {column!r} holds {table.features[column]}; give one caption per image.")
    return texts
