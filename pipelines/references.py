"""Interventions that take a concept's value from a reference image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from diffusers_ctx.context import Interventions


Reference = Image | np.ndarray | torch.Tensor
# one prompt's interventions, where a reference image may replace a strength
ReferencedInterventions = Interventions | Mapping[str, float | Reference]


def split_references(
    interventions: ReferencedInterventions | Sequence[ReferencedInterventions], num_rows: int
) -> tuple[Any, list[dict[str, Reference]]]:
    """The interventions at full strength where they have references, and each row's references by concept."""
    if isinstance(interventions, Mapping):
        strengths, references = _split(interventions)
        return strengths, [references] * num_rows
    if not isinstance(interventions, list | tuple) or not any(isinstance(row, Mapping) for row in interventions):
        return interventions, [{}] * num_rows
    rows = [_split(row) if isinstance(row, Mapping) else (row, {}) for row in interventions]
    return [strengths for strengths, _ in rows], [references for _, references in rows]


def number_of_sets(interventions: Any) -> int | None:
    """How many sets of interventions are listed; `None` if it is one for all."""
    is_list = isinstance(interventions, list | tuple) and not all(isinstance(entry, str) for entry in interventions)
    return len(interventions) if is_list else None


def _split(interventions: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Reference]]:
    references = {name: value for name, value in interventions.items() if _is_reference(value)}
    return dict(interventions) | dict.fromkeys(references, 1.0), references


def _is_reference(value: Any) -> bool:
    return isinstance(value, Image) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim >= 2)
