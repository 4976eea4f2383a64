"""How users name interventions, and the mask that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


# One prompt's interventions: names (full strength), or names with strengths in [0, 1].
Interventions = Sequence[str] | Mapping[str, float] | None


def intervention_mask(
    interventions: Interventions | Sequence[Interventions], concepts: Sequence[str], batch_size: int
) -> torch.Tensor:
    """The mask `m` that says how strongly each concept is intervened on.

    Args:
        interventions: a list of names, a mapping from names to strengths, or one of these per row of the batch.
            Nothing at all is the observational context.
        concepts: the known names, in the order of the mask's columns.
        batch_size: number of rows.

    Returns:
        `torch.Tensor` of shape (batch_size, len(concepts)), in [0, 1]. The order in which names are listed has no
        influence on it.

    Raises:
        ValueError: if a name is unknown or listed twice, a strength lies outside [0, 1], or there is neither one set
            of interventions nor one per row.
    """
    rows: list[Any] = [interventions] * batch_size if _is_single(interventions) else list(interventions or ())
    if len(rows) != batch_size:
        raise ValueError(
            f"`interventions` has {len(rows)} entries for {batch_size} prompts; give one set for all or one each."
        )
    return torch.tensor([_mask_row(row, concepts) for row in rows]).reshape(batch_size, len(concepts))


def _is_single(interventions) -> bool:
    if isinstance(interventions, str):
        raise ValueError(f"`interventions` is a list or a mapping of concepts; write [{interventions!r}].")
    if interventions is None or isinstance(interventions, Mapping):
        return True
    return all(isinstance(entry, str) for entry in interventions)


def _mask_row(interventions: Interventions, concepts: Sequence[str]) -> list[float]:
    _is_single(interventions)  # a bare string within a list of rows is the same mistake
    if isinstance(interventions, Mapping):
        strengths = dict(interventions)
    else:
        names = list(interventions or ())
        strengths = dict.fromkeys(names, 1.0)
        if len(strengths) < len(names):
            raise ValueError(f"`interventions` names a concept twice: {names}.")
    unknown = [name for name in strengths if name not in concepts]
    if unknown:
        raise ValueError(f"Unknown concepts {unknown}; this adapter knows {list(concepts)}.")
    for name, strength in strengths.items():
        if not 0 <= strength <= 1:
            raise ValueError(f"The strength of '{name}' is {strength}; strengths lie in [0, 1].")
    return [float(strengths.get(name, 0.0)) for name in concepts]
