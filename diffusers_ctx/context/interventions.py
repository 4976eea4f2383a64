"""How users write interventions, and the mask that they become."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, TypeGuard

import torch

from .names import normal_name


# One prompt's interventions: names (full strength), or names with strengths in [0, 1].
Interventions = Iterable[str] | Mapping[str, float] | None


def intervention_mask(
    interventions: Interventions | Sequence[Interventions],
    concepts: Sequence[str],
    batch_size: int,
    obs_context: str | None = None,
) -> torch.Tensor:
    """The mask `m` that says how strongly each concept is intervened on.

    Args:
        interventions: names, in a list or whatever can be iterated over; a mapping from names to strengths; or one of
            these per row of the batch, in order. Nothing at all is the observational context.
        concepts: the known names, in the order of the mask's columns.
        batch_size: number of rows.
        obs_context: name of the observational context, for a helpful error if it is named as a concept.

    Returns:
        `torch.Tensor` of shape (batch_size, len(concepts)), in [0, 1]. The order in which names are listed has no
        influence on it.

    Raises:
        ValueError: if a name is unknown or listed twice, a strength is no number in [0, 1], or there is neither one
            set of interventions nor one per row.
    """
    given = _listed(interventions)
    rows = given if _has_rows(given) else [given] * batch_size
    if len(rows) != batch_size:
        raise ValueError(
            f"`interventions` has {len(rows)} entries for {batch_size} prompts; give one set for all or one each."
        )
    masks = [_mask_row(_listed(row), concepts, obs_context) for row in rows]
    return torch.tensor(masks).reshape(batch_size, len(concepts))


def any_interventions(interventions: Interventions | Sequence[Interventions]) -> bool:
    """Whether there are any, of whatever concepts."""
    given = _listed(interventions)
    return any(bool(_listed(row)) for row in given) if _has_rows(given) else bool(given)


def _listed(interventions: Any) -> Any:
    """The same, and as a list what can be iterated over, perhaps only once; mistakes stay what they are."""
    if isinstance(interventions, str | Mapping) or not isinstance(interventions, Iterable):
        return interventions
    if isinstance(interventions, torch.Tensor):
        raise ValueError("`interventions` is a list or a mapping of concepts, and no tensor.")
    if isinstance(interventions, ItemsView):
        return dict(interventions)
    listed = list(interventions)
    if isinstance(interventions, Set) and _has_rows(listed):
        raise ValueError("`interventions` is a set, which has no order; list what each prompt is to have.")
    return listed


def _has_rows(interventions: Any) -> TypeGuard[list[Any]]:
    """Whether these are interventions per row; an empty list is none at all."""
    return isinstance(interventions, list) and not all(isinstance(entry, str) for entry in interventions)


def _mask_row(interventions: Any, concepts: Sequence[str], obs_context: str | None) -> list[float]:
    strengths = _strengths(interventions, obs_context)
    known = [normal_name(name) for name in concepts]
    unknown = [name for name in strengths if name not in known]
    if unknown:
        raise ValueError(f"Unknown concepts {unknown}; this adapter knows {list(concepts)}.")
    for name, strength in strengths.items():
        if not (_is_number(strength) and 0 <= float(strength) <= 1):
            raise ValueError(f"The strength of '{name}' is {strength!r}; strengths are numbers in [0, 1].")
    return [float(strengths.get(name, 0.0)) for name in known]


def _strengths(interventions: Any, obs_context: str | None) -> dict[str, Any]:
    """Strengths by name, of one row's interventions."""
    if isinstance(interventions, str):
        names = [name.strip() for name in interventions.split("+")]
        _refuse_observational(names, obs_context)
        raise ValueError(f"`interventions` is a list or a mapping of concepts; write {names}.")
    if not isinstance(interventions, Mapping | list | None):
        raise ValueError(f"`interventions` is a list or a mapping of concepts, and not {interventions!r}.")
    names = list(interventions or ())
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"`interventions` is a list or a mapping of concepts for each prompt, and not {names}.")
    values = interventions.values() if isinstance(interventions, Mapping) else [1.0] * len(names)
    strengths = dict(zip(map(normal_name, names), values))
    if len(strengths) < len(names):
        raise ValueError(f"`interventions` names a concept twice: {names}.")
    _refuse_observational(strengths, obs_context)
    return strengths


def _is_number(strength: Any) -> bool:
    return isinstance(strength, Real) or (isinstance(strength, torch.Tensor) and strength.numel() == 1)


def _refuse_observational(names: Iterable[str], obs_context: str | None) -> None:
    if obs_context is not None and normal_name(obs_context) in map(normal_name, names):
        raise ValueError(
            f"'{obs_context}' is the context without interventions, not a concept; write [] or None for it."
        )
