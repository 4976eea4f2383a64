"""Batches of a run whose images are streamed: read while the step before computes, and encoded in their own step."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL

from ...autoencoding import encode_pixels, latent_size
from ...data import context_mask
from ...data.streaming import ContextStream, ImageStream, open_stream, take_images
from ...keyed_random import keyed_seed
from ..config import TrainingConfig
from ..run.keyed_noise import KeyedNoise
from .batch import Batch, noise_of_batch
from .images import ImageTransform


_ENCODED_AT_ONCE = 16


def open_images(config: TrainingConfig) -> ImageStream:
    """The stream of a run's images; see [`~data.streaming.open_stream`]."""
    return open_stream(
        **config.data.source_options(),
        output_dir=config.output.output_dir,
        obs_context=config.data.obs_context,
        seed=config.optimization.seed,
    )


def take_concept_images(stream: ImageStream, config: TrainingConfig, show_progress: bool) -> datasets.Dataset:
    """The images that a run learns the concepts on; see [`~data.streaming.take_images`]."""
    data = config.data
    return take_images(
        stream,
        data.streaming_concept_images,
        concepts=data.concepts,
        obs_context=data.obs_context,
        skip_unreadable=data.skip_unreadable,
        seed=config.optimization.seed,
        show_progress=show_progress,
    )


@dataclass
class StreamedImages:
    """Images of a batch that is not encoded yet.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1].
        geometry: (V, B, 6), see [`Batch`]; V is 2 where images may be flipped, else 1.
        mask: (B, K).
        captions: B captions.
    """

    pixels: torch.Tensor
    geometry: torch.Tensor
    mask: torch.Tensor
    captions: list[str]

    def encode(self, vae: AutoencoderKL, random: KeyedNoise) -> Batch:
        """What `ContextLatents.batch` draws of the same images, encoded by the autoencoder now."""
        size, side = len(self.pixels), latent_size(vae, self.pixels.shape[-1])
        noise, flip = random.normal(size, vae.config.latent_channels, side, side), random.uniform(size)
        views = (flip * len(self.geometry)).long()
        pixels = torch.where(views.bool()[:, None, None, None], self.pixels.flip(-1), self.pixels)
        encoded = [encode_pixels(vae, part) for part in pixels.split(_ENCODED_AT_ONCE)]
        mean, std = (torch.cat(parts).float().cpu() for parts in zip(*encoded))
        geometry = self.geometry[views, torch.arange(size)]
        return Batch(mean + std * noise, None, self.mask, geometry, self.captions)


class StreamedBatches:
    """Batches of one process, each context equally often in those of all processes together.

    Every run of as many places in the global batches as there are contexts has each context once, in a random order
    that depends on the seed and the place alone; so does the place of an image's crop, which is another whenever it is
    seen. Images are this process's share of each context's stream.

    Checkpoints hold the place in the streams of all processes.

    Args:
        stream: the images.
        contexts: the contexts to show.
        concepts: the concepts, in the order of masks' columns.
        vae: the pretrained autoencoder, on its device.
        resolution: height and width of images.
        config: the run.
        accelerator: has the processes.
    """

    def __init__(
        self,
        stream: ImageStream,
        contexts: list[str],
        concepts: list[str],
        vae: AutoencoderKL,
        resolution: int,
        config: TrainingConfig,
        accelerator: Accelerator,
    ):
        data, self.seed = config.data, config.optimization.seed
        self.process_index, self.num_processes = accelerator.process_index, accelerator.num_processes
        self.batch_size = config.optimization.train_batch_size
        self.contexts = contexts = sorted(contexts)
        self.masks = context_mask(contexts, concepts, data.obs_context)
        self.vae = vae
        self.transform = ImageTransform(resolution, data.center_crop, self.seed)
        self.views = [False, True] if data.random_flip else [False]
        share = (self.process_index, self.num_processes)
        self.streams = [
            ContextStream(stream, context, data.streaming_shuffle_buffer, self.seed, *share, data.skip_unreadable)
            for context in contexts
        ]
        self._places = [stream.state_dict() for stream in self.streams]

    def check(self) -> None:
        """Reads the first images of each context.

        Raises:
            ValueError: if this process has none of a context.
        """
        for stream in self.streams:
            stream.fill()

    def batches(self, start: int) -> Iterator[tuple[Batch, KeyedNoise]]:
        """See [`Batches`].

        Raises:
            ValueError: if an image cannot be read, or a context comes to no more images.
        """
        for number, images in enumerate(self.images(start), start):
            random = noise_of_batch(self.seed, number, self.process_index, self.num_processes)
            yield images.encode(self.vae, random), random

    def images(self, start: int) -> Iterator[StreamedImages]:
        """The images of the batches from number `start` on; while one is used, the next one is read."""
        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(self._read, start)
            for number in count(start + 1):
                images, self._places = ahead.result()
                ahead = reader.submit(self._read, number)
                yield images

    def state_dict(self) -> dict[str, Any]:
        """The places after the last batch that was handed out. All processes must ask for it."""
        return {"contexts": self.contexts, "places": gather_object([self._places])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, with as many processes."""
        self._places = state["places"][self.process_index]
        for stream, place in zip(self.streams, self._places, strict=True):
            stream.load_state_dict(place)

    def _read(self, number: int) -> tuple[StreamedImages, list[dict[str, Any]]]:
        """The images of a batch, and the streams' places after it."""
        first = (number * self.num_processes + self.process_index) * self.batch_size
        order = [self._context_at(first + row) for row in range(self.batch_size)]
        pixels, geometries, captions = [], [], []
        for place, context in enumerate(order, first):
            image, caption = next(self.streams[context])
            pixels.append(self.transform(image, place))
            geometries.append(torch.stack([self.transform.geometry(image, place, flipped) for flipped in self.views]))
            captions.append(caption)
        stacked = (torch.stack(pixels), torch.stack(geometries, dim=1))
        images = StreamedImages(*stacked, self.masks[order], captions)
        return images, [stream.state_dict() for stream in self.streams]

    def _context_at(self, place: int) -> int:
        """The context's number at a place in the global batches of the whole run."""
        turn, position = divmod(place, len(self.contexts))
        return int(
            np.random.default_rng(keyed_seed(self.seed, "contexts", turn)).permutation(len(self.contexts))[position]
        )
