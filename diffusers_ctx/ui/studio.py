"""An adapter at work: all that the page shows is computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import dist
from threading import Lock
from typing import Any

import torch
from PIL.Image import Image

from .. import plot
from ..adapter_format import read_adapter_config
from ..data.decoding import square_crop
from ..embedded import embedded_call, embedded_or_given
from ..hub import resolve_adapter_folder
from ..pipelines.adapted import load_adapted_pipeline, recorded_base
from .figures import NODE_RADIUS, as_picture, node_places
from .recent import Recent
from .settings import Settings


OnStep = Callable[[int, int], None]
"""Told after each step how many are done, and of how many. What it raises ends the work."""

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SMALL_STEPS, _SMALL_GUIDANCE = 8, 1.0  # of the models that come with the library
_STEPS, _GUIDANCE = 25, 7.5
_PROMPTS = {"quad": "a picture of a square"}
_SMALL = 128  # pixels
_REMEMBERED = 32  # pictures


class Studio:
    """A pipeline with an adapter, for all visitors who choose it.

    One at a time uses the pipeline: during a call, its attention layers hold the scale and the tokens of that call.

    Args:
        adapter: name of one that comes with the library, folder, or Hub id.
        base: folder or Hub id of the base model; by default the one that the adapter names.
        dtype: precision of all models.

    Raises:
        AdapterError: if there is no such adapter, or it does not fit the base model.
        ValueError: if no base model is given and the adapter does not say enough to load one.
    """

    def __init__(self, adapter: str, base: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        folder = embedded_or_given(adapter)
        self.adapter = adapter
        self.base = base or base_of(adapter)
        self.dtype = dtype
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline: Any = load_adapted_pipeline(folder, self.base, dtype=dtype).pipeline
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(self.device)
        self._lock = Lock()
        self._images: Recent[Image] = Recent(_REMEMBERED)
        self._graphs: Recent[Image] = Recent(_REMEMBERED)
        module = self._pipeline.context_module
        self.concepts: list[str] = list(module.config.concepts)
        self.resolution: int = module.config.posterior_sample_size * pipeline.vae_scale_factor
        among_concepts = slice(len(self.concepts))  # and not the hidden factors, on which nobody intervenes
        self._strengths = module.causal.strengths().detach().float().cpu().numpy()[among_concepts, among_concepts]

    @property
    def pipeline_class(self) -> str:
        """Name of the pipeline's class."""
        return type(self._pipeline).__name__

    @property
    def is_small(self) -> bool:
        """Whether images are so small that their pixels are to be seen."""
        return self.resolution <= _SMALL

    @property
    def inches(self) -> float:
        """Width of an image in a figure."""
        return 1.5 if self.is_small else 3.0

    @property
    def models(self) -> dict[str, str | None]:
        """Names of the adapter and of the base model."""
        return {"adapter": self.adapter, "base": embedded_call(self.base) or self.base}

    def defaults(self) -> Settings:
        """What the page opens with: an intervention on the first concept, and few steps where they are enough."""
        comes_with_the_library = embedded_call(self.base) is not None
        return Settings(
            prompt=_PROMPTS.get(self.adapter, ""),
            interventions={self.concepts[0]: 1.0},
            seed=0,
            num_inference_steps=_SMALL_STEPS if comes_with_the_library else _STEPS,
            guidance_scale=_SMALL_GUIDANCE if comes_with_the_library else _GUIDANCE,
        )

    def draw(self, settings: Settings, on_step: OnStep) -> Image:
        """One picture. The last ones are remembered, so that a twin is drawn once while sliders move."""
        with self._lock:
            return self._images.get(repr(settings), lambda: self._draw(settings, on_step))

    def _draw(self, settings: Settings, on_step: OnStep) -> Image:
        return self._pipeline(
            settings.prompt,
            interventions=settings.interventions,
            generator=torch.Generator().manual_seed(settings.seed),
            callback_on_step_end=_telling(on_step, 0, settings.num_inference_steps),
            **settings.sampling,
        ).images[0]

    def pairs(self, settings: Settings, on_step: OnStep) -> Image:
        """A picture under each pair of concepts, from the same noise; single concepts are on the diagonal."""
        rows = pairs_of(self.concepts)
        images = self._sweeps(settings, rows, on_step)
        return as_picture(plot.image_grid(images, self.concepts, self.concepts, size=self.inches))

    def strip(self, settings: Settings, concept: str, on_step: OnStep) -> Image:
        """Pictures under rising strengths of one concept, beside the other interventions of the settings."""
        row = [settings.interventions | {concept: strength} for strength in STRENGTHS]
        (images,) = self._sweeps(settings, [row], on_step)
        return as_picture(plot.strength_strip(images, STRENGTHS, concept, size=self.inches))

    def counterfactual(
        self,
        image: Image,
        settings: Settings,
        factual: Sequence[str],
        on_step: OnStep,
        reference: Image | None = None,
        transplanted: Sequence[str] = (),
    ) -> Image:
        """A picture, what it would have been under the interventions of the settings, and the difference.

        Args:
            image: of any size and mode; it is cropped to the square that the adapter was trained on.
            settings: prompt, interventions and number of steps.
            factual: concepts that the picture arose under.
            on_step: told of each step of the generation; the inversion before it counts as none.
            reference: a second picture.
            transplanted: concepts that take the values that the second picture shows.
        """
        before = self.crop(image)
        references = {} if reference is None else dict.fromkeys(transplanted, self.crop(reference))
        with self._lock:
            after = self._pipeline.counterfactual(
                before,
                settings.interventions | references,
                list(factual),
                settings.prompt,
                settings.num_inference_steps,
                callback_on_step_end=_telling(on_step, 0, settings.num_inference_steps),
            ).images
        return as_picture(plot.counterfactuals([before], after, size=self.inches))

    def crop(self, image: Image) -> Image:
        """The square in the middle of a picture, at the size that the adapter was trained on."""
        return square_crop(image, self.resolution)

    def graph(self, intervened: Sequence[str]) -> Image:
        """The learned graph of the concepts; what the interventions cause is lit."""
        with self._lock:
            return self._graphs.get(
                tuple(intervened),
                lambda: as_picture(plot.causal_graph(self._strengths, self.concepts, intervened=intervened)),
            )

    def effects(self, intervened: Sequence[str]) -> list[str]:
        """The concepts that interventions cause to change, in the learned graph."""
        return plot.effects(self._strengths, self.concepts, intervened)

    def concept_at(self, x: float, y: float) -> str | None:
        """The concept at a point of the graph's picture, in pixels from its upper left; `None` if there is none."""
        near = [name for name, place in self._places.items() if dist(place, (x, y)) < NODE_RADIUS]
        return near[0] if near else None

    @cached_property
    def _places(self) -> dict[str, tuple[float, float]]:
        return dict(zip(self.concepts, node_places(plot.causal_graph(self._strengths, self.concepts))))

    def _sweeps(
        self, settings: Settings, rows: Sequence[Sequence[dict[str, float]]], on_step: OnStep
    ) -> list[list[Image]]:
        """A picture for each set of interventions, row by row, all from the same noise."""
        steps = settings.num_inference_steps
        drawn = []
        for index, row in enumerate(rows):
            with self._lock:
                output = self._pipeline.sweep(
                    settings.prompt,
                    row,
                    generator=torch.Generator().manual_seed(settings.seed),
                    callback_on_step_end=_telling(on_step, index * steps, len(rows) * steps),
                    **settings.sampling,
                )
            drawn.append(output.images)
        return drawn


def base_of(adapter: str) -> str:
    """Folder or Hub id of the base model that an adapter names.

    Raises:
        AdapterError: if there is no such adapter.
        ValueError: if it does not say enough to load one.
    """
    folder = embedded_or_given(adapter)
    return recorded_base(folder, read_adapter_config(resolve_adapter_folder(folder)))


def pairs_of(concepts: Sequence[str]) -> list[list[dict[str, float]]]:
    """Interventions on each pair of concepts, once: a row per concept, with those up to itself."""
    return [[{row: 1.0, column: 1.0} for column in concepts[: index + 1]] for index, row in enumerate(concepts)]


def _telling(on_step: OnStep, done: int, total: int) -> Callable[..., dict]:
    """A callback of diffusers that tells of each step."""

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
        on_step(done + step + 1, total)
        return tensors

    return on_step_end
