"""Images that differ in their interventions alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from .counterfactual import CounterfactualMixin
from .outputs import ComposablePipelineOutput
from .references import ReferencedInterventions


class SweepMixin(CounterfactualMixin):
    """Adds strips of images to a pipeline with a context adapter."""

    def sweep(
        self,
        prompt: str | None = None,
        interventions: Sequence[ReferencedInterventions] = (),
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> ComposablePipelineOutput | tuple:
        r"""Draws one image for each set of interventions, in one batch and from the same noise.

        `[{"snow": s} for s in (0, 0.5, 1)]` shows what the strength of one concept changes.

        Args:
            prompt: the prompt of all images.
            interventions: as in `__call__`, a set for each image.
            generator: as in `__call__`, but not advanced; the same for all images.
            kwargs: arguments of `__call__`. Images and tensors with one row are the same for all.

        Raises:
            ValueError: like `__call__`; if there are several prompts or generators, or no sets of interventions.
        """
        rows = list(interventions)
        if not rows or all(isinstance(row, str) for row in rows):
            raise ValueError('`interventions` lists a set for each image, such as `[[], ["snow"], {"snow": 0.5}]`.')
        if not isinstance(prompt, str | None) or not isinstance(generator, torch.Generator | None):
            raise ValueError("A sweep has one prompt and one generator; give `__call__` several.")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        same = {name: _for_each(name, value, len(rows)) for name, value in kwargs.items()}
        same |= {} if prompt is None else {"prompt": [prompt] * len(rows)}
        return self(interventions=rows, generator=[_copy(generator) for _ in rows], **same)  # type: ignore[operator]


def _for_each(name: str, value: Any, num_images: int) -> Any:
    """An argument of a call for one image, for several."""
    if isinstance(value, Image) or (isinstance(value, str) and "prompt" in name):
        return [value] * num_images
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1:
        return value.expand(num_images, *value.shape[1:])
    return value


def _copy(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
