import numpy as np
import pytest

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import (
    counterfactual_effectiveness,
    counterfactual_error,
    counterfactual_minimality,
)
from diffusers_ctx.evaluation.quad_attributes import attribute_difference, read_attributes, true_attributes


def images(n, seed):
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)


def test_the_error_is_the_mean_difference_of_pixels():
    a, b = images(6, seed=0), images(6, seed=1)
    assert counterfactual_error(a, a) == 0
    by_hand = [abs(int(x) - int(y)) / 255 for x, y in zip(a.ravel(), b.ravel())]
    assert counterfactual_error(a, b) == pytest.approx(np.mean(by_hand), rel=1e-12)
    assert counterfactual_error(np.zeros_like(a), np.full_like(a, 255)) == 1


def test_each_image_is_compared_with_its_own():
    a = images(6, seed=2)
    assert counterfactual_error(a, a) == 0 < counterfactual_error(a, a[::-1])


def test_bytes_are_scaled_and_floats_are_not():
    a, b = images(6, seed=3), images(6, seed=4)
    distance = counterfactual_error(a, b)
    assert counterfactual_error((a / 255).astype(np.float32), b) == pytest.approx(distance, rel=1e-6)
    assert counterfactual_error(a / 1.0, b / 1.0) == pytest.approx(255 * distance)


def test_a_simulator_is_sound():
    sample = quad.generate((), n=50, seed=5)
    changed = sample.counterfactual(["quad4"])
    assert counterfactual_error(sample.images, sample.counterfactual([]).images) == 0
    assert counterfactual_error(sample.images, changed.counterfactual([]).images) == 0
    assert counterfactual_error(sample.images, changed.images) > 0.2  # of leaving the images as they are


def test_effectiveness_by_hand():
    read = np.array([[1.0, 0.0, 5.0], [2.0, -1.0, 5.0]])
    targets = np.array([[1.5, 0.0, 4.0], [1.0, 0.0, 8.0]])
    assert counterfactual_effectiveness(read, targets) == pytest.approx([0.75, 0.5, 2.0])


@pytest.mark.parametrize("interventions", [["size"], ["quad4"], ["shape"], ["size", "quad3"]])
def test_minimality_of_a_simulator(interventions):
    sample = quad.generate((), n=50, seed=6)
    changed = sample.counterfactual(interventions)
    movable = set(interventions).union(*map(quad.descendants, interventions))
    fixed = np.array([name not in movable for name in quad.FACTORS])
    assert counterfactual_minimality(sample.factors, changed.factors, fixed) == pytest.approx(np.zeros(fixed.sum()))
    assert (counterfactual_minimality(sample.factors, changed.factors, ~fixed) > 0.1).all()


def test_attributes_read_off_images_are_compared_in_their_own_way():
    sample = quad.generate((), n=40, seed=7)
    changed = sample.counterfactual(["orientation"])
    read, target = read_attributes(changed.images).values, true_attributes(changed.factors)
    effectiveness = counterfactual_effectiveness(read, target, attribute_difference)
    assert (effectiveness < 0.01).all()
    factual = read_attributes(sample.images).values
    fixed = np.array([name not in ("orientation", *quad.descendants("orientation")) for name in quad.FACTORS])
    minimality = counterfactual_minimality(factual, read, fixed, attribute_difference)
    assert (minimality < 0.01).all()
    moved = counterfactual_minimality(factual, read, ~fixed, attribute_difference)
    assert (moved > 0.02).all()


def test_minimality_by_hand():
    factual, moved = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), np.array([[0.5, 3.0, 0.0], [0.0, 3.0, 1.0]])
    assert counterfactual_minimality(factual, moved, np.array([True, False, True])) == pytest.approx([0.75, 0])
    assert counterfactual_minimality(factual, moved, np.zeros(3, dtype=bool)).shape == (0,)


def test_images_that_are_no_pairs():
    with pytest.raises(ValueError, match="Got 3 and 2 images"):
        counterfactual_error(images(3, 0), images(2, 0))
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\)"):
        counterfactual_error(images(3, 0)[0], images(3, 0)[0])


def test_attributes_that_are_no_pairs():
    values = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 2\)"):
        counterfactual_effectiveness(values, values[:2])
    with pytest.raises(ValueError, match=r"\(0, 2\) and \(0, 2\)"):
        counterfactual_effectiveness(values[:0], values[:0])
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 2\)"):
        counterfactual_minimality(values[:2], values, np.array([True, False]))
    with pytest.raises(ValueError, match="a boolean for each"):
        counterfactual_minimality(values, values, np.array([0, 1]))
    with pytest.raises(ValueError, match="a boolean for each"):
        counterfactual_minimality(values, values, np.array([True]))
