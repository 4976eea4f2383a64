"""A cache of encoded captions on disk, keyed by the captions and the content of the text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from ...adapter.text_encoders import tokenizer_of
from ...fingerprint import fingerprint
from ...pipelines import CompositionMixin, Conditioner
from ..config import TrainingConfig
from ..run.files import check_room, check_writable, needs_making, wait_for_file, writing_to_cache


_BATCH_SIZE = 16


def create_caption_encoder(
    config: TrainingConfig, pipeline: CompositionMixin, captions: Iterable[str], wait_for_other_process: bool
) -> Callable[[list[str]], dict[str, torch.Tensor]]:
    """What encodes the run's captions, like `Conditioner.encode_captions`: a cache where there is to be one.

    Text encoders that learn make other encodings in every step, so that there is nothing to keep.

    Args:
        config: the run's options.
        pipeline: its text encoders.
        captions: those of the images; the empty one is added.
        wait_for_other_process: as for [`CaptionCache`].

    Raises:
        OSError: as [`CaptionCache`].
    """
    folder = config.data.encoding_dir
    if folder is None or config.model.train_text_encoder:
        return Conditioner.of(pipeline).encode_captions
    return CaptionCache(pipeline, {"", *captions}, folder, wait_for_other_process)


class CaptionCache:
    """Encodes captions like `Conditioner.encode_captions`, each once; afterwards they are read from an Arrow file.

    The file is mapped, not loaded into memory, and made anew if it is damaged. Several processes may write it at once.

    Args:
        pipeline: its text encoders must not change.
        captions: every caption that will be asked for.
        folder: the cache.
        wait_for_other_process: wait for the file of another process on this machine, instead of encoding.

    Raises:
        OSError: if the folder cannot be written to or has no room.
    """

    def __init__(
        self, pipeline: CompositionMixin, captions: Iterable[str], folder: Path, wait_for_other_process: bool = False
    ):
        ordered = sorted(set(captions))
        self.device = pipeline.device
        conditioner = Conditioner.of(pipeline)
        self.rows = {caption: row for row, caption in enumerate(ordered)}
        with torch.no_grad():
            sample = conditioner.encode_captions(ordered[:1])
        self.dtypes = {name: tensor.dtype for name, tensor in sample.items()}
        self.shapes = {name: tensor.shape[1:] for name, tensor in sample.items()}

        def encode(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                encoded = conditioner.encode_captions(batch["caption"])
            return {name: tensor.float().flatten(1).cpu().numpy() for name, tensor in encoded.items()}

        def is_whole() -> bool:
            return _is_whole(file, len(ordered), self.shapes)

        key = _content_key(pipeline, ordered, self.shapes)
        file = folder / f"captions-{key}.arrow"
        if wait_for_other_process:
            wait_for_file(file, is_whole)
        elif needs_making(file, is_whole):
            file.unlink(missing_ok=True)  # or it would be read
            check_writable(folder, "cache_dir")
            check_room(folder, 4 * len(ordered) * sum(shape.numel() for shape in self.shapes.values()))
        with writing_to_cache(file):
            self.encoded = datasets.Dataset.from_dict({"caption": ordered}).map(
                encode,
                batched=True,
                batch_size=_BATCH_SIZE,
                remove_columns="caption",
                features=datasets.Features({name: datasets.Sequence(datasets.Value("float32")) for name in sample}),
                cache_file_name=str(file),
                new_fingerprint=key,
                desc="Encoding captions",
            )
        self.encoded.set_format("torch")

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The encoded captions: tensors with one row per caption.

        Raises:
            KeyError: if a caption was not announced.
        """
        rows = self.encoded[[self.rows[caption] for caption in captions]]
        return {
            name: torch.stack(list(values)).unflatten(1, self.shapes[name]).to(self.device, self.dtypes[name])
            for name, values in rows.items()
        }


def _is_whole(file: Path, rows: int, shapes: dict[str, torch.Size]) -> bool:
    """Whether the file can be read, and has as many rows of tensors of these shapes."""
    try:
        table = datasets.Dataset.from_file(str(file)).data
    except (OSError, ValueError):  # `pyarrow.ArrowInvalid` is one
        return False
    if len(table) != rows or set(table.column_names) != set(shapes):
        return False
    lengths = {name: pc.unique(pc.list_value_length(table[name])).to_pylist() for name in shapes}
    return lengths == {name: [shape.numel()] for name, shape in shapes.items()}


def _content_key(pipeline: CompositionMixin, captions: list[str], shapes: dict[str, torch.Size]) -> str:
    """The fingerprint of the captions, their tokens, the text encoders, and the shapes of what they return."""
    zeros = pipeline.config.get("force_zeros_for_empty_prompt")
    parts: list[Any] = [type(pipeline).__name__, zeros, captions, shapes]
    conditioner = Conditioner.of(pipeline)
    for name, encoder in conditioner.text_encoders.items():
        tokenizer, limit = pipeline.components[tokenizer_of(name)], conditioner.caption_limits[name]
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, max_length=limit, return_tensors="np"
        ).input_ids
        parts += [encoder.config.to_json_string(), tokens, encoder]
    return fingerprint(*parts)
