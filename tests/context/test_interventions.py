import unicodedata
from types import MappingProxyType

import numpy as np
import pytest
import torch

from diffusers_ctx.context import any_interventions, intervention_mask


CONCEPTS = ["night", "snow", "fog"]


@pytest.mark.parametrize(
    ("interventions", "expected"),
    [
        (None, [[0, 0, 0]] * 2),
        ([], [[0, 0, 0]] * 2),
        (["snow"], [[0, 1, 0]] * 2),
        (["fog", "night"], [[1, 0, 1]] * 2),
        (["night", "fog"], [[1, 0, 1]] * 2),
        ({"fog": 0.25}, [[0, 0, 0.25]] * 2),
        ([["night"], ["snow", "fog"]], [[1, 0, 0], [0, 1, 1]]),
        ([{"night": 0.5}, None], [[0.5, 0, 0], [0, 0, 0]]),
        ([[], ["fog"]], [[0, 0, 0], [0, 0, 1]]),
    ],
)
def test_masks(interventions, expected):
    assert torch.equal(intervention_mask(interventions, CONCEPTS, 2), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    "give",
    [
        iter,
        lambda names: map(str.strip, names),
        lambda names: filter(None, [*names, ""]),
        lambda names: (name for name in names),
        tuple,
        set,
        frozenset,
        np.array,
        lambda names: dict.fromkeys(names).keys(),
        lambda names: dict.fromkeys(names, 1.0).items(),
        lambda names: MappingProxyType(dict.fromkeys(names, 1.0)),
        lambda names: dict.fromkeys(names, torch.tensor([1.0])),
    ],
)
def test_names_come_from_anything_that_can_be_iterated_over(give):
    """For all prompts, and for each of them."""
    names, expected = ["fog", "night"], torch.tensor([[1.0, 0, 1]])
    assert torch.equal(intervention_mask(give(names), CONCEPTS, 2), expected.repeat(2, 1))
    assert torch.equal(intervention_mask([give(names), None], CONCEPTS, 2), torch.cat([expected, 0 * expected]))
    rows = (row for row in [give(names), ["snow"]])
    assert torch.equal(intervention_mask(rows, CONCEPTS, 2), torch.cat([expected, torch.tensor([[0.0, 1, 0]])]))
    assert any_interventions(give(names)) and any_interventions(iter([None, give(names)]))


def test_there_are_no_interventions_in_nothing():
    assert not any(any_interventions(given) for given in (None, [], {}, (), iter([]), np.array([]), [None, []]))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_the_same_in_either_normal_form(form):
    concepts = [unicodedata.normalize(form, name) for name in ("café", "snow")]
    for name in ("NFC", "NFD"):
        name = unicodedata.normalize(name, "café")
        assert torch.equal(intervention_mask([name], concepts, 1), torch.tensor([[1.0, 0]]))
        assert torch.equal(intervention_mask({name: 0.5}, concepts, 1), torch.tensor([[0.5, 0]]))
        with pytest.raises(ValueError, match="is the context without"):
            intervention_mask([name], ["snow"], 1, obs_context=concepts[0])


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        (["rain"], r"rain.*night.*snow.*fog"),
        ("snow", r"write \['snow'\]"),
        (["snow", "snow"], "twice"),
        ({"snow": 1.5}, r"\[0, 1\]"),
        ({"snow": -0.1}, r"\[0, 1\]"),
        ({"snow": float("nan")}, r"\[0, 1\]"),
        ({"snow": "0.5"}, r"'snow' is '0\.5'; strengths are numbers"),
        ({"snow": None}, "strengths are numbers"),
        ("snow + fog", r"write \['snow', 'fog'\]"),
        (3, "list or a mapping of concepts, and not 3"),
        ([["snow"], 3], "list or a mapping of concepts, and not 3"),
        ("clear", r"'clear' is the context without interventions.*write \[\] or None"),
        (["clear"], r"write \[\] or None"),
        ([{"clear": 1.0}, "snow"], r"write \[\] or None"),
        ([["snow"], "clear"], r"write \[\] or None"),
        ([["snow"], ["fog"], ["night"]], "3 entries for 2 prompts"),
        (iter([["snow"], ["fog"], ["night"]]), "3 entries for 2 prompts"),
        ({frozenset(["snow"]), frozenset(["fog"])}, "set, which has no order"),
        (torch.tensor([0.0, 1.0, 0.0]), "no tensor"),
        ([[["snow"]], None], "for each prompt"),
        ({1: 0.5}, "for each prompt"),
        ({"snow": torch.tensor([0.5, 0.5])}, "strengths are numbers"),
    ],
)
def test_mistakes_are_named(interventions, message):
    with pytest.raises(ValueError, match=message):
        intervention_mask(interventions, CONCEPTS, 2, obs_context="clear")
