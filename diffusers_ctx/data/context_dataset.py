"""Images in contexts: one folder per context, or a dataset with a `context` column.

A context is named after what was intervened on in it: `night`, or `night+snow` where several interventions were made
at once. The observational context, in which nobody intervened, has a name of its own, by default `obs`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset

from .folder_captions import check_root, read_captions
from .listing import listed


_DEFAULT_TEXT_COLUMN = "text"
_DATA_FILES = {".parquet", ".arrow", ".tar"}  # a folder that holds one of these is `datasets.load_dataset`'s to read


def interventions_of(context: str, obs_context: str = "obs") -> tuple[str, ...]:
    """The concepts that were intervened on in a context: `()`, `("night",)`, or `("night", "snow")` for `night+snow`.

    Args:
        context: the context's name.
        obs_context: the observational context's name.

    Raises:
        ValueError: if a part of a joined name is empty, repeated, or the observational context.
    """
    if context == obs_context:
        return ()
    concepts = tuple(context.split("+"))
    spaced = any(concept != concept.strip() for concept in concepts)
    if "" in concepts or obs_context in concepts or len(set(concepts)) < len(concepts) or spaced:
        raise ValueError(
            f"The context {context!r} does not name its interventions; write each concept once, joined by '+' without "
            f"spaces, as in 'night+snow', and without {obs_context!r}."
        )
    return concepts


def concepts_of(contexts: Iterable[str], obs_context: str = "obs") -> list[str]:
    """Every concept that some context intervenes on, sorted by name; see `interventions_of`."""
    return sorted({concept for context in set(contexts) for concept in interventions_of(context, obs_context)})


def context_mask(contexts: Sequence[str], concepts: Sequence[str], obs_context: str = "obs") -> torch.Tensor:
    """Intervention masks (B, K) float32 of B contexts over K concepts: 1 where the context intervenes, else 0.

    Args:
        contexts: B names of contexts.
        concepts: K names of concepts, in the order of the columns.
        obs_context: the observational context's name; its rows are zeros.

    Raises:
        ValueError: if a context intervenes on a concept that is not among `concepts`.
    """
    column = {concept: index for index, concept in enumerate(concepts)}
    mask = torch.zeros(len(contexts), len(concepts))
    for row, context in enumerate(contexts):
        for concept in interventions_of(context, obs_context):
            if concept not in column:
                raise ValueError(f"The context {context!r} intervenes on {concept!r}; known are {list(concepts)}.")
            mask[row, column[concept]] = 1
    return mask


def load_context_dataset(
    source: str | Path | Dataset,
    *,
    obs_context: str = "obs",
    concepts: Sequence[str] | None = None,
    image_column: str = "image",
    context_column: str = "context",
    text_column: str = _DEFAULT_TEXT_COLUMN,
    name: str | None = None,
    split: str = "train",
    skip_unreadable: bool = False,
    cache_dir: str | Path | None = None,
    max_samples_per_context: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads images in contexts and checks all that could stop a training run later, every image included.

    A local folder holds one sub-folder per context (`root/obs/*.png`, `root/night/*.jpg`), with captions, where there
    are any, in the sub-folder's `metadata.csv` or `metadata.jsonl` (`file_name` and `text`, as for the datasets
    library's imagefolder). Anything else is a dataset with a column of images, one of contexts and optionally one of
    captions.

    The rows are not taken through imagefolder itself: as soon as one metadata file exists it drops every image that
    no metadata file names and the folders' names with them, it reads metadata files in an order that changes between
    processes, and it takes a folder named `test` for a split.

    Args:
        source: the folder of contexts, a name or folder that `datasets.load_dataset` takes, or a `datasets.Dataset`.
        obs_context: the observational context's name.
        concepts: the concepts to keep, by default all. Contexts that intervene on any other are left out.
        image_column: the dataset's column of images; unused for a folder of contexts.
        context_column: the dataset's column of contexts, strings or class labels; unused for a folder of contexts.
        text_column: the column of captions, also in metadata files. A dataset may lack it if it has the default name.
        name: the configuration of a dataset that `datasets.load_dataset` loads, where it has several.
        split: the split of such a dataset.
        skip_unreadable: whether images that cannot be decoded are left out, with one warning, and not an error.
        cache_dir: where `datasets.load_dataset` caches.
        max_samples_per_context: keeps at most so many images of each context, drawn at random.
        seed: seed of that draw.

    Returns:
        A map-style dataset with the columns `image` (decoded to RGB), `context` and `text` (empty where there is
        none), in an order that depends on the source alone.

    Raises:
        FileNotFoundError: if `source` is neither a folder nor a dataset that can be found.
        TypeError: if `source` is none of the kinds above.
        ValueError: if the observational context or every other one is missing, a context is empty, an image cannot be
            read, a concept is unknown or named twice, a column is missing, or images lie outside their contexts.
    """
    if max_samples_per_context is not None and max_samples_per_context < 1:
        raise ValueError(f"`max_samples_per_context` is {max_samples_per_context}; it must be 1 or more.")
    if is_context_root(source):
        kept = kept_contexts(context_folders(Path(source)), concepts, obs_context)
        dataset = read_folders(Path(source), kept, text_column)
    else:
        table = source if isinstance(source, Dataset) else load_source(source, name, split, cache_dir)
        dataset = _read_columns(table, image_column, context_column, text_column)
        kept = kept_contexts(dataset.unique("context"), concepts, obs_context)
    rows = _rows(list(dataset["context"]), kept, max_samples_per_context, seed)
    rows = _readable_rows(dataset, rows, skip_unreadable)
    return dataset.select(rows)


# Which contexts there are, and which are kept


def kept_contexts(contexts: Iterable[str], concepts: Sequence[str] | None, obs_context: str) -> list[str]:
    """The contexts that intervene on `concepts` alone, sorted; see `load_context_dataset` for what it raises."""
    contexts = sorted(contexts)
    if obs_context not in contexts:
        raise ValueError(
            f"There is no observational context {obs_context!r}; found {contexts}. Add its images under that name, "
            "or, in training, give the name that they have as `obs_context` (`--obs_context`)."
        )
    known = concepts_of(contexts, obs_context)
    if not known:
        raise ValueError(
            f"Only the observational context {obs_context!r} was found; add at least one context in which a concept "
            "was intervened on, named after the concept."
        )
    _check_one_name_each(contexts, obs_context)
    _check_spelling(known, contexts)
    if concepts is None:
        return contexts
    repeated = sorted({concept for concept in concepts if list(concepts).count(concept) > 1})
    if repeated:
        raise ValueError(f"The concepts {repeated} are named more than once; name each once.")
    unknown = [concept for concept in concepts if concept not in known]
    if unknown or not concepts:
        raise ValueError(f"`concepts` is {list(concepts)}; choose one or more of {known}.")
    kept = [context for context in contexts if set(interventions_of(context, obs_context)) <= set(concepts)]
    joined = [concept for concept in concepts if concept not in concepts_of(kept, obs_context)]
    if joined:
        raise ValueError(
            f"The concepts {joined} were intervened on only together with concepts outside {list(concepts)}, in "
            f"{sorted(set(contexts) - set(kept))}; choose those too."
        )
    return kept


def _check_one_name_each(contexts: list[str], obs_context: str) -> None:
    named: dict[frozenset[str], str] = {}
    for context in contexts:
        other = named.setdefault(frozenset(interventions_of(context, obs_context)), context)
        if other != context:
            raise ValueError(f"The contexts {other!r} and {context!r} have the same interventions; merge them.")


def _check_spelling(concepts: list[str], contexts: list[str]) -> None:
    """Refuses concepts that only capitals tell apart, and warns of those that occur in compositions alone."""
    spelled: dict[str, str] = {}
    for concept in concepts:
        other = spelled.setdefault(concept.casefold(), concept)
        if other != concept:
            raise ValueError(f"The concepts {other!r} and {concept!r} differ in capitals alone; spell them the same.")
    for concept in concepts:
        if concept not in contexts:
            alike = difflib.get_close_matches(concept, set(concepts) & set(contexts), n=1)
            question = f"; is it {alike[0]!r}, misspelled?" if alike else "."
            warnings.warn(
                f"The concept {concept!r} has no context of its own, only compositions{question}", stacklevel=4
            )


def _rows(contexts: list[str], kept: list[str], limit: int | None, seed: int) -> list[int]:
    """Indices of the rows in kept contexts, in order, at most `limit` of each."""
    codes = np.array(contexts)
    rng = np.random.default_rng(seed)
    members = (np.flatnonzero(codes == context) for context in kept)
    return sorted(np.concatenate([rng.permutation(rows)[:limit] for rows in members]).tolist())


# A folder of contexts


def is_context_root(source: Any) -> bool:
    """Whether it is a folder of contexts, and not one that `datasets.load_dataset` reads."""
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        return False
    return not any(path.suffix in _DATA_FILES and path.stem != "metadata" for path in Path(source).rglob("*"))


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
    """The contexts that a folder has sub-folders of."""
    stray = _images_among(root, root.iterdir())
    if stray:
        raise ValueError(
            f"Images lie directly in {root}, so their context is unknown: {listed([path.name for path in stray])}. "
            "Move each into a sub-folder named after its context, such as 'obs'."
        )
    check_root(root)
    return [path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.relative_to(root))]


def read_folders(root: Path, contexts: list[str], text_column: str) -> Dataset:
    """The images in these sub-folders, by name, and their captions."""
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
    if not Path(source).is_dir() and (isinstance(source, Path) or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no folder {str(source)!r}; check the path.")  # and no need to ask the Hub
    try:
        cache = str(cache_dir) if cache_dir else None
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


def _read_columns(table: Dataset, image_column: str, context_column: str, text_column: str) -> Dataset:
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


# Images that cannot be read


def _readable_rows(dataset: Dataset, rows: list[int], skip_unreadable: bool) -> list[int]:
    """Decodes every row's image; returns the rows whose image can be, or raises and names the rest."""
    encoded = dataset.cast_column("image", Image(decode=False))
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        defects = dict(zip(rows, pool.map(lambda row: _defect(encoded[row]["image"]), rows)))
    broken = {row: defect for row, defect in defects.items() if defect}
    if not broken:
        return rows
    message = f"{len(broken)} of {len(rows)} images cannot be read: " + listed(
        [f"{_name(encoded[row], row)} ({defect})" for row, defect in broken.items()]
    )
    if not skip_unreadable:
        raise ValueError(
            f"{message}. Repair or remove them, or pass `skip_unreadable=True` (`--skip_unreadable`) to leave them"
            " out."
        )
    readable = [row for row in rows if row not in broken]
    contexts = list(dataset["context"])
    emptied = sorted({contexts[row] for row in broken} - {contexts[row] for row in readable})
    if emptied:
        raise ValueError(f"{message}. No image is left in the contexts {emptied}; add readable ones.")
    warnings.warn(f"{message}. They are left out.", stacklevel=3)
    return readable


def decode_image(image: dict[str, Any] | None) -> PIL.Image.Image:
    """An encoded image in RGB.

    Raises:
        ValueError: if it cannot be decoded, saying why.
    """
    if image is None:
        raise ValueError("no image")
    try:
        return Image(mode="RGB").decode_example(image)
    except Exception as error:  # Pillow's decoders raise many types on broken files
        raise ValueError(str(error) or type(error).__name__) from error


def _defect(image: dict[str, Any] | None) -> str | None:
    """Why an encoded image cannot be decoded, or None if it can."""
    try:
        decode_image(image)
    except ValueError as error:
        return str(error)
    return None


def _name(example: dict[str, Any], row: int) -> str:
    return (example["image"] or {}).get("path") or f"row {row}, context {example['context']!r}"
