"""Images in contexts, read as they are needed: for collections that do not fit on the disk."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from ..context.names import normal_name
from .contexts import interventions_of, kept_contexts, listed
from .decoding import warn_of_conversions
from .encoded_images import RGBImage, read_image
from .folders import ContextFolders, is_context_root
from .shuffle_buffer import ShuffleBuffer
from .sources import load_source, wanted_columns
from .stream_rows import ContextRows, Row, in_epoch, matching


logger = logging.getLogger(__name__)

_FOLDER_SHARDS = 64  # the files of a folder are divided among them


@dataclass(frozen=True)
class ImageStream:
    """A dataset of images in contexts that is streamed.

    Attributes:
        rows: the dataset; its images are the content of their files, or their names.
        image_column: its column of images.
        context_column: its column of contexts.
        text_column: its column of captions, if it has one.
        contexts: its contexts, if they are known before it is read.
        has_names: whether its rows hold only the names of files, so that passing over images costs nothing.
        converted: the kinds of conversions to RGB that were said.
    """

    rows: IterableDataset
    image_column: str
    context_column: str
    text_column: str | None
    contexts: list[str] | None
    has_names: bool = False
    converted: set[str] = field(default_factory=set)

    def context_of(self, row: Row) -> str:
        """The name of a row's context.

        Raises:
            ValueError: if it has none.
        """
        value, feature = row[self.context_column], self.rows.features[self.context_column]
        if isinstance(feature, ClassLabel) and value in range(feature.num_classes):  # -1 stands for none
            value = feature.names[value]
        if not isinstance(value, str):
            raise ValueError(
                f"A row has {value!r} in the column {self.context_column!r}; give each row its context's name."
            )
        return normal_name(value)

    def text_of(self, row: Row) -> str:
        """A row's caption, empty where there is none."""
        return (row[self.text_column] if self.text_column else None) or ""


def open_stream(
    source: str | Path,
    *,
    image_column: str = "image",
    context_column: str = "context",
    text_column: str = "text",
    name: str | None = None,
    split: str = "train",
    cache_dir: str | Path | None = None,
    output_dir: str | Path | None = None,
    obs_context: str = "obs",
    seed: int = 0,
) -> ImageStream:
    """Opens a folder of contexts or a dataset and checks its columns, without reading an image.

    Of a folder of contexts, the names of all files are read and shuffled, and its metadata is read.

    Args:
        source: the folder of contexts, or a name or folder that `datasets.load_dataset` takes.
        image_column: the dataset's column of images; unused for a folder of contexts.
        context_column: the dataset's column of contexts, strings or class labels; unused for a folder of contexts.
        text_column: the column of captions, also in metadata files. A dataset may lack it if it has the default name.
        name: the configuration of a dataset, where it has several.
        split: the split of a dataset.
        cache_dir: where `datasets.load_dataset` caches.
        output_dir: where a run writes; it is no context, should it lie in the folder of contexts.
        obs_context: the observational context's name, by which a folder of contexts is known.
        seed: seed of a folder's order.

    Raises:
        FileNotFoundError: if `source` is neither a folder nor a dataset that can be found.
        ValueError: if a column is missing or holds something else, or images lie outside their contexts.
    """
    if is_context_root(source, obs_context):
        folders = ContextFolders(source, output_dir)
        files = folders.read(folders.contexts, text_column).shuffle(seed=seed)
        rows = files.to_iterable_dataset(num_shards=min(_FOLDER_SHARDS, len(files)))
        rows = rows.cast_column("image", Image(decode=False))
        return ImageStream(rows, "image", "context", "text", folders.contexts, has_names=True)
    rows = load_source(source, name, split, cache_dir, streaming=True)
    columns = wanted_columns(rows, image_column, context_column, text_column)
    named = rows.features[context_column]
    contexts = list(map(normal_name, named.names)) if isinstance(named, ClassLabel) else None
    for column in columns[1 if contexts is None else 2 :]:
        if rows.features[column] not in (Value("string"), Value("large_string")):
            raise ValueError(f"The column {column!r} holds {rows.features[column]}; it should hold text.")
    rows = rows.select_columns(columns).cast_column(columns[0], Image(decode=False))
    return ImageStream(rows, columns[0], columns[1], columns[2] if len(columns) > 2 else None, contexts)


def take_images(
    stream: ImageStream,
    images_per_context: int,
    *,
    concepts: Sequence[str] | None = None,
    obs_context: str = "obs",
    skip_unreadable: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> Dataset:
    """The first images of each context, in the form of `load_context_dataset`.

    The seed decides the order of the stream's files. Contexts with several interventions are taken if they occur
    before the single ones are complete, unless the stream names its contexts.

    Args:
        stream: the images.
        images_per_context: how many to take; fewer where the stream has fewer.
        concepts: the concepts to keep. They may be left out if the stream names its contexts.
        obs_context: the observational context's name.
        skip_unreadable: whether images that cannot be decoded are left out, with one warning, and not an error.
        seed: seed of the order of files.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: if the contexts cannot be known, one of them has no images or none for a million rows, or an image
            cannot be read.
    """
    if stream.contexts is not None:
        wanted = allowed = kept_contexts(stream.contexts, concepts, obs_context)
    elif concepts:
        concepts = list(map(normal_name, concepts))
        wanted, allowed = [normal_name(obs_context), *dict.fromkeys(concepts)], None
    else:
        raise ValueError(
            f"The column {stream.context_column!r} holds text, so which contexts there are is not known before all of"
            " the stream has been read; name the `concepts`."
        )
    taken: list[Row] = []
    counts: Counter[str] = Counter()
    broken: list[str] = []
    converted: list[str] = []

    def lacking() -> list[str]:
        return [context for context in wanted if counts[context] < images_per_context]

    def is_wanted(row: Row) -> bool:
        context = stream.context_of(row)
        known = context in allowed if allowed else set(interventions_of(context, obs_context)) <= set(concepts or ())
        return known and counts[context] < images_per_context

    rows = in_epoch(stream.rows, seed, epoch=0)
    total = len(wanted) * images_per_context
    with tqdm(total=total, desc="Taking images from the stream", disable=not show_progress) as progress:
        for row in matching(rows, is_wanted, lambda: f"any of {lacking()}"):
            context, image = stream.context_of(row), row[stream.image_column]
            try:
                converted += read_image(image)[1]
            except ValueError as error:
                broken.append(_describe(image, context, error))
                if not skip_unreadable:
                    raise ValueError(_unreadable(broken[-1])) from error
                continue
            taken.append({"image": image, "context": context, "text": stream.text_of(row)})
            counts[context] += 1
            progress.update(context in wanted)
            if not lacking():
                break
    if broken:
        warnings.warn(f"Images that cannot be read are left out: {listed(broken)}.", stacklevel=2)
    warn_of_conversions(converted)
    stream.converted.update(converted)
    empty = [context for context in allowed or () if not counts[context]]
    if empty:
        raise ValueError(f"The stream has no images of the contexts {empty}; add some, or leave out their concepts.")
    kept_contexts(counts, concepts, obs_context)
    features = Features({"image": RGBImage(), "context": Value("string"), "text": Value("string")})
    return Dataset.from_list(taken, features=features)


class ContextStream:
    """The images of one context, endlessly, or a process's share of them: each once per epoch, in an order of its own.

    The files of the stream are shuffled for each epoch, and their images in a [`ShuffleBuffer`]. If the number of a
    dataset's files is a multiple of the number of processes, each process reads its own files; otherwise each reads
    all files and keeps every n-th image of the context. In the same epoch no two processes have the same image.

    `state_dict` is the place in the stream: another stream that loads it continues with the same images.

    Args:
        stream: the images of all contexts; those of other contexts are read and passed over.
        context: the context.
        shuffle_buffer: size of the buffer, which holds images in memory as they are encoded in their files.
        seed: seed of the order.
        process_index: this process.
        num_processes: all processes.
        skip_unreadable: whether images that cannot be decoded are passed over, with a warning, and not an error.
    """

    def __init__(
        self,
        stream: ImageStream,
        context: str,
        shuffle_buffer: int,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        skip_unreadable: bool = False,
    ):
        self.stream = stream
        self.context = context
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        share, all_of_it = (process_index, num_processes), (0, 1)
        has_files = not stream.has_names and stream.rows.num_shards % num_processes == 0
        # a copy: datasets keep the place of their iteration in themselves
        self._rows = split_dataset_by_node(deepcopy(stream.rows), *(share if has_files else all_of_it))
        self._share = all_of_it if has_files else share
        self._buffer: ShuffleBuffer[Row]
        self._begin_epoch(0)

    def __iter__(self) -> Iterator[tuple[PIL.Image.Image, str]]:
        return self

    def __next__(self) -> tuple[PIL.Image.Image, str]:
        """An image and its caption.

        Raises:
            ValueError: if it cannot be read, the stream has no image of the context, or none for a million rows.
        """
        while True:
            self.fill()
            row = next(self._buffer)
            image = row[self.stream.image_column]
            try:
                decoded, converted = read_image(image)
            except ValueError as error:
                description = _describe(image, self.context, error)
                if not self.skip_unreadable:
                    raise ValueError(_unreadable(description)) from error
                logger.warning(f"An image cannot be read and is passed over: {description}.")
                continue
            self._epoch_has_images = True
            if new := set(converted) - self.stream.converted:
                self.stream.converted.update(new)
                logger.warning(f"Images of the stream are converted to RGB: some {', '.join(sorted(new))}.")
            return decoded, self.stream.text_of(row)

    def fill(self) -> None:
        """Fills the shuffle buffer if it is empty; see `__next__` for what it raises."""
        while not self._buffer.fill():
            if not self._epoch_has_images:
                raise ValueError(
                    f"There is no readable image of the context {self.context!r} in this process's share of the stream"
                    f" ({self.stream.rows.num_shards} files or shards). Start fewer processes, or shuffle the dataset,"
                    " so that each of its files has images of all contexts."
                )
            self._begin_epoch(self._epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream."""
        return {"epoch": self._epoch, **self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a place; the images in the buffer are read again.

        Raises:
            ValueError: if the stream has fewer images than it had.
        """
        self._begin_epoch(state["epoch"])
        try:
            self._buffer.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"The stream has fewer images of the context {self.context!r} than when the checkpoint was written;"
                " resume with the same files."
            ) from error
        self._epoch_has_images = True

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._epoch_has_images = False
        rows = ContextRows(self._rows, self.context, self.stream.context_of, self._share, self.seed, epoch)
        self._buffer = ShuffleBuffer(rows, self.shuffle_buffer, (self.seed, epoch))


def _describe(image: Row | None, context: str, defect: ValueError) -> str:
    return f"{(image or {}).get('path') or 'one without a name'}, context {context!r} ({defect})"


def _unreadable(description: str) -> str:
    return (
        f"An image of the stream cannot be read: {description}. Repair or remove it, or set `skip_unreadable` to leave"
        " such images out."
    )
