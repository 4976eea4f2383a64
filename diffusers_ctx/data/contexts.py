"""Names of contexts, the interventions that they stand for, and the contexts that a choice of concepts keeps.

A context is named after its interventions: `night`, or `night+snow` for several at once. The observational context,
without interventions, has a name of its own, by default `obs`. Names are compared in their normal form; see
`normal_name`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch

from ..context.interventions import intervention_mask
from ..context.names import normal_name


_LISTED = 20


def interventions_of(context: str, obs_context: str = "obs") -> tuple[str, ...]:
    """The concepts that a context intervenes on: `()`, `("night",)`, or `("night", "snow")` for `night+snow`.

    Args:
        context: the context's name.
        obs_context: the observational context's name.

    Raises:
        ValueError: if a part of a joined name is empty, repeated, or the observational context.
    """
    context, obs_context = normal_name(context), normal_name(obs_context)
    if context == obs_context:
        return ()
    concepts = tuple(context.split("+"))
    spaced = any(concept != concept.strip() for concept in concepts)
    if "" in concepts or obs_context in concepts or len(set(concepts)) < len(concepts) or spaced:
        raise ValueError(
            f"The context {context!r} does not name its interventions; write each concept once, joined by '+' without "
            f"spaces, as in 'night+snow', and without {obs_context!r}."
        )
    return concepts


def concepts_of(contexts: Iterable[str], obs_context: str = "obs") -> list[str]:
    """Every concept that some context intervenes on, sorted by name; see `interventions_of`."""
    return sorted({concept for context in set(contexts) for concept in interventions_of(context, obs_context)})


def context_mask(contexts: Sequence[str], concepts: Sequence[str], obs_context: str = "obs") -> torch.Tensor:
    """Intervention masks (B, K) float32 of B contexts over K concepts: 1 where the context intervenes, else 0.

    Args:
        contexts: B names of contexts.
        concepts: K names of concepts, in the order of the columns.
        obs_context: the observational context's name; its rows are zeros.

    Raises:
        ValueError: if a context intervenes on a concept that is not among `concepts`.
    """
    concepts = [normal_name(concept) for concept in concepts]
    interventions = [interventions_of(context, obs_context) for context in contexts]
    for context, names in zip(contexts, interventions):
        if unknown := [name for name in names if name not in concepts]:
            raise ValueError(f"The context {context!r} intervenes on {unknown[0]!r}; known are {concepts}.")
    return intervention_mask(interventions, concepts, len(interventions), obs_context)


def kept_contexts(contexts: Iterable[str], concepts: Sequence[str] | None, obs_context: str) -> list[str]:
    """The contexts that intervene on `concepts` alone, in their normal form, sorted.

    See `load_context_dataset` for what it raises.
    """
    contexts, obs_context = sorted(map(normal_name, contexts)), normal_name(obs_context)
    if not contexts:
        raise ValueError(
            f"There are no folders of images here; there have to be {obs_context!r} and a folder for each concept."
        )
    if obs_context not in contexts:
        raise ValueError(
            f"There is no observational context {obs_context!r}; found {contexts}. Add its images under that name, "
            "or, in training, give the name that they have as `obs_context` (`--obs_context`)."
        )
    known = concepts_of(contexts, obs_context)
    if not known:
        raise ValueError(
            f"Only the observational context {obs_context!r} was found; add at least one context in which a concept "
            "was intervened on, named after the concept."
        )
    _check_one_name_each(contexts, obs_context)
    never_alone = [concept for concept in known if concept not in contexts]
    if never_alone:
        warnings.warn(
            f"The concepts {never_alone} have no context of their own, only compositions; are they spelled right?",
            stacklevel=3,
        )
    if concepts is None:
        return contexts
    concepts = [normal_name(concept) for concept in concepts]
    repeated = sorted({concept for concept in concepts if concepts.count(concept) > 1})
    if repeated:
        raise ValueError(f"The concepts {repeated} are named more than once; name each once.")
    unknown = [concept for concept in concepts if concept not in known]
    if unknown or not concepts:
        raise ValueError(f"`concepts` is {concepts}; choose one or more of {known}.")
    kept = [context for context in contexts if set(interventions_of(context, obs_context)) <= set(concepts)]
    joined = [concept for concept in concepts if concept not in concepts_of(kept, obs_context)]
    if joined:
        raise ValueError(
            f"The concepts {joined} were intervened on only together with concepts outside {concepts}, in "
            f"{sorted(set(contexts) - set(kept))}; choose those too."
        )
    return kept


def _check_one_name_each(contexts: list[str], obs_context: str) -> None:
    named: dict[frozenset[str], str] = {}
    for context in contexts:
        other = named.setdefault(frozenset(interventions_of(context, obs_context)), context)
        if other != context:
            raise ValueError(f"The contexts {other!r} and {context!r} have the same interventions; merge them.")


def listed(names: Sequence[str]) -> str:
    """Some names for a message, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
