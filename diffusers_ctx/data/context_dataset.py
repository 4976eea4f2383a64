"""Images in contexts, as a dataset that is checked in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..keyed_random import keyed_seed
from .contexts import kept_contexts
from .encoded_images import readable_rows
from .folders import ContextFolders, is_context_root
from .sources import load_source, read_columns


def load_context_dataset(
    source: str | Path | Dataset,
    *,
    obs_context: str = "obs",
    concepts: Sequence[str] | None = None,
    image_column: str = "image",
    context_column: str = "context",
    text_column: str = "text",
    name: str | None = None,
    split: str = "train",
    skip_unreadable: bool = False,
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    max_samples_per_context: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads images in contexts, and checks everything that could stop a training run later, including every image.

    A local folder holds one sub-folder per context (`root/obs/*.png`, `root/night/*.jpg`), with captions, where there
    are any, in a `metadata.csv`, `metadata.jsonl` or `metadata.parquet` beside images or above (`file_name` and
    `text`, as for the datasets library's imagefolder), or in a text file for each image (`a.caption` beside `a.png`).
    What else lies there is passed over, with one warning. Anything else is a dataset with a column of images, one of
    contexts and optionally one of captions.

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
        output_dir: where a run writes; it is no context, should it lie in the folder of contexts.
        max_samples_per_context: keeps at most this many images of each context, drawn at random.
        seed: seed of that draw.

    Returns:
        A map-style dataset with the columns `image` (decoded to RGB, see [`~data.decoding.to_rgb`]), `context` and
        `text` (empty where there is none), in an order that depends on the source alone.

    Raises:
        FileNotFoundError: if `source` is neither a folder nor a dataset that can be found.
        TypeError: if `source` is none of the kinds above.
        ValueError: if the observational context or every other one is missing, a context is empty, an image cannot be
            read, a concept is unknown or named twice, a column is missing, or images lie outside their contexts.
    """
    if max_samples_per_context is not None and max_samples_per_context < 1:
        raise ValueError(f"`max_samples_per_context` is {max_samples_per_context}; it must be 1 or more.")
    if not isinstance(source, Dataset) and is_context_root(source, obs_context):
        folders = ContextFolders(source, output_dir)
        kept = kept_contexts(folders.contexts, concepts, obs_context)
        dataset = folders.read(kept, text_column)
    else:
        table = source if isinstance(source, Dataset) else load_source(source, name, split, cache_dir)
        dataset = read_columns(table, image_column, context_column, text_column)
        kept = kept_contexts(dataset.unique("context"), concepts, obs_context)
    rows = _rows(list(dataset["context"]), kept, max_samples_per_context, seed)
    rows = readable_rows(dataset, rows, skip_unreadable)
    return dataset.select(rows)


def _rows(contexts: list[str], kept: list[str], limit: int | None, seed: int) -> list[int]:
    """Indices of the rows in kept contexts, in order, at most `limit` of each."""
    codes = np.array(contexts)
    rng = np.random.default_rng(keyed_seed(seed, "samples"))
    members = (np.flatnonzero(codes == context) for context in kept)
    return sorted(np.concatenate([rng.permutation(rows)[:limit] for rows in members]).tolist())
