"""How users name interventions, and the mask that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch


# One prompt's interventions: names (full strength), or names with strengths in [0, 1].
Interventions = Sequence[str] | Mapping[str, float] | None


def intervention_mask(
    interventions: Interventions | Sequence[Interventions],
    concepts: Sequence[str],
    batch_size: int,
    obs_context: str | None = None,
) -> torch.Tensor:
    """The mask `m` that says how strongly each concept is intervened on.

    Args:
        interventions: a list of names, a mapping from names to strengths, or one of these per row of the batch.
            Nothing at all is the observational context.
        concepts: the known names, in the order of the mask's columns.
        batch_size: number of rows.
        obs_context: name of the observational context, to say how it is written if it is taken for a concept.

    Returns:
        `torch.Tensor` of shape (batch_size, len(concepts)), in [0, 1]. The order in which names are listed has no
        influence on it.

    Raises:
        ValueError: if a name is unknown or listed twice, a strength is no number in [0, 1], or there is neither one
            set of interventions nor one per row.
    """
    single = _is_single(interventions, obs_context)
    rows: list[Any] = [interventions] * batch_size if single else list(interventions or ())
    if len(rows) != batch_size:
        raise ValueError(
            f"`interventions` has {len(rows)} entries for {batch_size} prompts; give one set for all or one each."
        )
    masks = [_mask_row(row, concepts, obs_context) for row in rows]
    return torch.tensor(masks).reshape(batch_size, len(concepts))


def _is_single(interventions, obs_context: str | None) -> bool:
    if isinstance(interventions, str):
        _refuse_observational([interventions], obs_context)
        names = [name.strip() for name in interventions.split("+")]
        raise ValueError(f"`interventions` is a list or a mapping of concepts; write {names}.")
    if interventions is None or isinstance(interventions, Mapping):
        return True
    if not isinstance(interventions, Iterable):
        raise ValueError(f"`interventions` is a list or a mapping of concepts, and not {interventions!r}.")
    return all(isinstance(entry, str) for entry in interventions)


def _mask_row(interventions: Interventions, concepts: Sequence[str], obs_context: str | None) -> list[float]:
    _is_single(interventions, obs_context)  # a bare string within a list of rows is the same mistake
    if isinstance(interventions, Mapping):
        strengths = dict(interventions)
    else:
        names = list(interventions or ())
        strengths = dict.fromkeys(names, 1.0)
        if len(strengths) < len(names):
            raise ValueError(f"`interventions` names a concept twice: {names}.")
    _refuse_observational(strengths, obs_context)
    unknown = [name for name in strengths if name not in concepts]
    if unknown:
        raise ValueError(f"Unknown concepts {unknown}; this adapter knows {list(concepts)}.")
    for name, strength in strengths.items():
        if not (isinstance(strength, Real | torch.Tensor) and 0 <= strength <= 1):
            raise ValueError(f"The strength of '{name}' is {strength!r}; strengths are numbers in [0, 1].")
    return [float(strengths.get(name, 0.0)) for name in concepts]


def _refuse_observational(names: Iterable[str], obs_context: str | None) -> None:
    if obs_context is not None and obs_context in names:
        raise ValueError(
            f"'{obs_context}' is the context without interventions, and no concept; write [] or None for it."
        )
