import pytest
import torch

from diffusers_ctx.context import intervention_mask


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
    ],
)
def test_mistakes_are_named(interventions, message):
    with pytest.raises(ValueError, match=message):
        intervention_mask(interventions, CONCEPTS, 2, obs_context="clear")
