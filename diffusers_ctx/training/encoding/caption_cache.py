"""Encoded captions on disk, found again by the captions and by what encoded them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch

from ...pipelines import CompositionMixin, Conditioner
from ..run.files import check_room, check_writable, wait_for_file, writing_to_cache


_BATCH_SIZE = 16


class CaptionCache:
    """Encodes captions as `Conditioner.encode_captions` does, each only once: the rest is read from an Arrow file.

    Files are not read into memory as a whole. Several processes may write them at once.

    Args:
        pipeline: has the text encoders, which must not change.
        captions: all that will be asked for.
        folder: where the files are.
        wait_for_other_process: whether another process of this machine does it, whose file is waited for.

    Raises:
        OSError: if the folder cannot be written to, or has no room for what is encoded.
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

        key = _content_key(pipeline, ordered, self.shapes)
        file = folder / f"captions-{key}.arrow"
        if wait_for_other_process:
            wait_for_file(file)
        elif not file.exists():
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
        """What the text encoders make of captions: tensors with a row for each.

        Raises:
            KeyError: if one was not announced.
        """
        rows = self.encoded[[self.rows[caption] for caption in captions]]
        return {
            name: torch.stack(list(values)).unflatten(1, self.shapes[name]).to(self.device, self.dtypes[name])
            for name, values in rows.items()
        }


def _content_key(pipeline: CompositionMixin, captions: list[str], shapes: dict[str, torch.Size]) -> str:
    """A digest of the captions' tokens, of the text encoders' weights and settings, and of what is kept."""
    settings = (type(pipeline).__name__, pipeline.config.get("force_zeros_for_empty_prompt"), captions, shapes)
    digest = hashlib.sha256(repr(settings).encode())
    for name, encoder in pipeline.text_encoders.items():
        tokenizer = pipeline.components[name.replace("text_encoder", "tokenizer")]
        tokens = tokenizer(captions, padding="max_length", truncation=True).input_ids
        digest.update(repr((encoder.config.to_json_string(), tokens)).encode())
        for parameter, weight in sorted(encoder.state_dict().items()):
            digest.update(f"{parameter} {weight.dtype}".encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
