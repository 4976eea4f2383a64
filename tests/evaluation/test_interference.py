import warnings

import numpy as np
import pytest

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.interference import interference_matrix, mean_difference, spillover
from diffusers_ctx.evaluation.quad_attributes import attribute_difference, read_attributes, true_attributes


nan = np.nan


def test_known_answers():
    before = np.array([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0]])
    after = [before + np.array(change) for change in ([1, 0, -2], [[0, 1, 0], [2, -3, 0]])]
    matrix = interference_matrix(before, after, scale=np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(matrix, [[1, 0, 0.5], [1, 1, 0]])
    found = spillover(matrix, np.array([[True, False, False], [False, True, True]]))
    assert found.forbidden == pytest.approx((0 + 0.5 + 1) / 3)
    assert found.allowed == pytest.approx((1 + 1 + 0) / 3)


def test_unrelated_images_are_one_apart():
    first, second, third = np.random.default_rng(0).normal([0, 5], [1, 10], (3, 20_000, 2))
    scale = mean_difference(first, second)
    np.testing.assert_allclose(scale, np.array([1, 10]) * 2 / np.sqrt(np.pi), rtol=0.02)  # Gini's, of normal laws
    np.testing.assert_allclose(interference_matrix(first, [third, first], scale), [[1, 1], [0, 0]], rtol=0.02)


def test_what_cannot_be_compared_is_left_out():
    before = np.array([[0.0, nan, nan], [1.0, 1.0, nan]])
    after = np.array([[0.5, 3.0, 1.0], [nan, 1.5, 1.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(mean_difference(before, after), [0.5, 0.5, nan])
        matrix = interference_matrix(before, [after], np.ones(3))
        found = spillover(matrix, np.array([[True, False, False]]))
        assert (found.allowed, found.forbidden) == (0.5, 0.5)
        assert np.isnan(spillover(matrix, np.ones((1, 3), dtype=bool)).forbidden)


def test_a_period_is_given_by_the_difference():
    def turns(a, b):
        difference = np.abs(a - b) % 1
        return np.minimum(difference, 1 - difference)

    before, after = np.array([[0.9], [0.1]]), np.array([[0.1], [0.1]])
    np.testing.assert_allclose(interference_matrix(before, [after], np.array([0.25]), turns), [[0.4]])


def quad_matrix(attributes, n):
    before, unrelated = (quad.generate(n=n, seed=quad.FIRST_HELD_OUT_SEED + seed) for seed in (30, 31))
    scale = mean_difference(attributes(before), attributes(unrelated), attribute_difference)
    after = [attributes(before.counterfactual((name,))) for name in quad.CONCEPTS]
    return interference_matrix(attributes(before), after, scale, attribute_difference)


ALLOWED = np.array([[name == c or name in quad.descendants(c) for name in quad.FACTORS] for c in quad.CONCEPTS])


def test_true_counterfactuals_move_descendants_alone():
    matrix = quad_matrix(lambda sample: true_attributes(sample.factors), n=500)
    assert matrix.shape == (len(quad.CONCEPTS), len(quad.FACTORS))
    np.testing.assert_array_equal(matrix[~ALLOWED], 0)
    assert (matrix[ALLOWED] > 0.1).all()
    found = spillover(matrix, ALLOWED)
    assert found.forbidden == 0
    assert found.allowed == pytest.approx(np.mean([matrix[i, j] for i, j in zip(*np.where(ALLOWED))]))


def test_reading_true_counterfactuals_off_images_adds_little():
    matrix = quad_matrix(lambda sample: read_attributes(sample.images).values, n=40)
    found = spillover(matrix, ALLOWED)
    assert found.forbidden < 0.005
    assert found.allowed > 0.5


@pytest.mark.parametrize(
    "before, after, scale, message",
    [
        (np.zeros((3, 2)), [np.zeros((3, 2))], np.ones(3), "for each of the 2 attributes"),
        (np.zeros((3, 2)), [np.zeros((3, 2))], np.array([1.0, 0.0]), "above 0"),
        (np.zeros((3, 2)), [np.zeros((3, 2))], np.array([1.0, nan]), "above 0"),
        (np.zeros((3, 2)), [], np.ones(2), "`after` is empty"),
        (np.zeros((3, 2)), [np.zeros((4, 2))], np.ones(2), r"\(3, 2\) and \(4, 2\)"),
        (np.zeros((0, 2)), [np.zeros((0, 2))], np.ones(2), "n at least 1"),
    ],
)
def test_bad_input(before, after, scale, message):
    with pytest.raises(ValueError, match=message):
        interference_matrix(before, after, scale)


@pytest.mark.parametrize("allowed", [np.ones((2, 3), dtype=bool), np.ones((2, 2), dtype=int)])
def test_allowed_is_a_mask_of_the_matrix(allowed):
    with pytest.raises(ValueError, match="give bool of shape"):
        spillover(np.zeros((2, 2)), allowed)
