import numpy as np
import pytest

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.conformity import composition_gap, conformity
from diffusers_ctx.evaluation.quad_attributes import true_attributes


nan = np.nan


def uniform(n, a, seed):
    return np.random.default_rng(seed).random((n, a))


def test_known_answer():
    reference = np.stack([np.arange(101), 2 * np.arange(101)], axis=1) / 100  # central 80 %: [0.1, 0.9] and [0.2, 1.8]
    values = np.array([[0.1, 0.2], [0.5, 1.9], [0.05, 1], [0.95, 2], [0.9, 1.8]])
    found = conformity(values, reference, level=0.8)
    assert found.per_attribute == pytest.approx([3 / 5, 3 / 5])
    assert found.joint == pytest.approx(2 / 5)


@pytest.mark.parametrize("at_the_limit", [4, 6])  # of 1,000, of which 5 are below the region
def test_values_at_a_limit_conform_with_a_tolerance_whatever_the_reference_has(at_the_limit):
    reference = np.concatenate([np.zeros(at_the_limit), np.linspace(0.001, 1, 1000 - at_the_limit)])[:, None]
    values = np.array([[0.0], [0.0], [0.5], [-0.01]])
    assert conformity(values, reference).joint == (1 / 4 if at_the_limit == 4 else 3 / 4)
    assert conformity(values, reference, tolerance=0.002).joint == 3 / 4


@pytest.mark.parametrize("level", [0.99, 0.9])
def test_a_second_sample_conforms_as_the_level_says(level):
    found = conformity(uniform(4000, 3, seed=0), uniform(4000, 3, seed=1), level)
    assert found.per_attribute == pytest.approx([level] * 3, abs=0.015)
    assert found.joint == pytest.approx(level**3, abs=0.02)
    same = np.tile(uniform(4000, 1, seed=2), 3)  # attributes that are one and the same
    assert conformity(same, np.tile(uniform(4000, 1, seed=3), 3), level).joint == pytest.approx(level, abs=0.015)


def test_another_law_does_not_conform_and_a_collapse_does():
    reference = uniform(1000, 2, seed=4)
    shifted = uniform(1000, 2, seed=5) + np.array([0, 0.5])
    assert conformity(shifted, reference).per_attribute == pytest.approx([0.99, 0.5], abs=0.05)
    assert conformity(shifted + 2, reference).joint == 0
    assert conformity(np.full((10, 2), 0.5), reference).joint == 1


def test_unreadable_values_conform_where_the_reference_has_them_too():
    reference = uniform(1000, 1, seed=6)
    values = np.array([[0.5], [nan], [nan], [2.0]])
    assert conformity(values, reference).joint == 1 / 4
    reference[:10] = nan  # 1 %: not more than the region leaves out
    assert conformity(values, reference, level=0.98).joint == 1 / 4
    reference[:200] = nan
    assert conformity(values, reference).joint == 3 / 4
    reference[:] = nan
    assert conformity(values, reference).joint == 2 / 4


def test_interventions_of_quad_conform_to_their_own_law():
    pair = ("quad1", "quad4")
    columns = [quad.FACTORS.index(name) for name in pair]

    def draw(interventions, seed):
        factors = quad.generate(interventions, n=400, seed=quad.FIRST_HELD_OUT_SEED + seed).factors
        return true_attributes(factors)[:, columns]

    reference = draw(pair, seed=20)
    real = conformity(draw(pair, seed=21), reference)
    assert real.joint > 0.95
    assert conformity(draw((), seed=22), reference).joint < 0.5
    quad4_alone = conformity(draw(("quad4",), seed=23), reference)  # quad1 still follows quad4
    assert quad4_alone.per_attribute[1] > 0.95
    assert quad4_alone.joint < 0.4


@pytest.mark.parametrize(
    "values, reference, level, message",
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), 0.9, r"\(3, 2\) and \(3, 1\)"),
        (np.zeros(3), np.zeros(3), 0.9, r"\(3,\) and \(3,\)"),
        (np.zeros((0, 2)), np.zeros((3, 2)), 0.9, "at least one"),
        (np.zeros((3, 2)), np.zeros((0, 2)), 0.9, "at least one"),
        (np.zeros((3, 2)), np.zeros((3, 2)), 99, "`level` is 99"),
    ],
)
def test_bad_input(values, reference, level, message):
    with pytest.raises(ValueError, match=message):
        conformity(values, reference, level)


def test_composition_gap():
    assert composition_gap([0.1, 0.2, 0.3], [0.25, 0.45]) == pytest.approx(0.15)
    assert composition_gap(np.array([0.3]), np.array([0.1, 0.2])) == pytest.approx(-0.15)
    with pytest.raises(ValueError, match="0 single errors and 1 of pairs"):
        composition_gap([], [0.1])
