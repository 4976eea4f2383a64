import math
import sys

import numpy as np
import ot
import pytest

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation import bootstrap_interval, debiased, sliced_wasserstein_distance


def random_images(n, seed, shape=(4, 5, 3)):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def unit_directions(dimension, count, seed):
    directions = np.random.RandomState(seed).standard_normal((dimension, count))
    return directions / np.sqrt((directions**2).sum(0))


def recomputed(a, b, n_projections=200, seed=0):
    """One direction at a time; both sets are repeated to the same size, which does not change their distributions."""
    size = math.lcm(len(a), len(b))
    a, b = (np.repeat(images.reshape(len(images), -1) / 255, size // len(images), axis=0) for images in (a, b))
    squares = []
    for direction in unit_directions(a.shape[1], n_projections, seed).T:
        squares.append(np.mean((np.sort(a @ direction) - np.sort(b @ direction)) ** 2))
    return math.sqrt(np.mean(squares))


def test_identical_sets_are_nothing_apart():
    images = random_images(300, seed=0)
    assert sliced_wasserstein_distance(images, images) == 0
    shuffled = images[np.random.default_rng(1).permutation(300)]
    assert sliced_wasserstein_distance(images, shuffled) < 1e-6


@pytest.mark.parametrize("n, m", [(40, 40), (40, 60), (7, 3), (1, 5), (700, 350)])
def test_equals_an_independent_recomputation(n, m):
    a, b = random_images(n, seed=2), random_images(m, seed=3) // 2
    assert sliced_wasserstein_distance(a, b) == pytest.approx(recomputed(a, b), rel=1e-4)
    assert sliced_wasserstein_distance(a, b, 17, seed=5) == pytest.approx(recomputed(a, b, 17, seed=5), rel=1e-4)


def test_equals_pot_on_flattened_pixels():
    a, b = random_images(50, seed=4), random_images(60, seed=5) // 3
    flat = [images.reshape(len(images), -1) / 255 for images in (a, b)]
    expected = ot.sliced_wasserstein_distance(*flat, n_projections=200, seed=9)
    assert sliced_wasserstein_distance(a, b, seed=9) == pytest.approx(expected, rel=1e-5)


def test_a_shift_of_every_pixel_by_s_is_about_s():
    images = random_images(100, seed=6, shape=(8, 8, 3)) / 2 / 255
    distance = sliced_wasserstein_distance(images, images + 0.25, n_projections=2000)
    shares = unit_directions(8 * 8 * 3, 2000, seed=0).sum(0)  # of the shift, in each direction
    assert distance == pytest.approx(0.25 * math.sqrt(np.mean(shares**2)), rel=1e-4)
    assert distance == pytest.approx(0.25, rel=0.05)


def test_black_and_white_are_about_one_apart():
    black, white = (np.full((3, 16, 16, 3), value, dtype=np.uint8) for value in (0, 255))
    assert sliced_wasserstein_distance(black, white, n_projections=2000) == pytest.approx(1, rel=0.05)


def test_is_symmetric_and_ignores_order():
    a, b = random_images(30, seed=7), random_images(45, seed=8) // 2
    distance = sliced_wasserstein_distance(a, b)
    assert sliced_wasserstein_distance(b, a) == pytest.approx(distance, rel=1e-6)
    assert sliced_wasserstein_distance(a[::-1], np.roll(b, 11, axis=0)) == pytest.approx(distance, rel=1e-5)


def test_bytes_are_scaled_and_floats_are_not():
    a, b = random_images(30, seed=9), random_images(30, seed=10) // 2
    distance = sliced_wasserstein_distance(a, b)
    assert sliced_wasserstein_distance(a / 255, b) == pytest.approx(distance, rel=1e-5)
    halves = [(images / 255).astype(np.float16) for images in (a, b)]
    assert sliced_wasserstein_distance(*halves) == pytest.approx(distance, rel=1e-2)
    assert sliced_wasserstein_distance(a / 1.0, b / 1.0) == pytest.approx(255 * distance, rel=1e-5)


def test_seeds_choose_the_directions():
    a, b = random_images(30, seed=11), random_images(30, seed=12) // 2
    assert sliced_wasserstein_distance(a, b, seed=1) == sliced_wasserstein_distance(a, b, seed=1)
    assert sliced_wasserstein_distance(a, b, seed=1) != sliced_wasserstein_distance(a, b, seed=2)


def test_the_baseline_of_quad_falls_with_the_number_of_images():
    first, second = quad.generate((), n=1600, seed=31), quad.generate((), n=1600, seed=32)
    baselines = {n: sliced_wasserstein_distance(first.images[:n], second.images[:n]) for n in (100, 400, 1600)}
    # in one dimension the distance between two samples of a distribution falls with the root of n
    assert 1.4 < baselines[100] / baselines[400] < 2.9
    assert 1.4 < baselines[400] / baselines[1600] < 2.9
    intervened = quad.generate(("quad4",), n=1600, seed=33)
    distances = {n: sliced_wasserstein_distance(first.images[:n], intervened.images[:n]) for n in (400, 1600)}
    assert distances[1600] == pytest.approx(0.265, abs=0.03)
    assert distances[1600] > 5 * baselines[1600]
    assert debiased(distances[400], baselines[400]) == pytest.approx(distances[1600], rel=0.15)


def test_debiased():
    assert debiased(0.5, 0.3) == pytest.approx(0.4)
    assert debiased(0.5, 0.0) == 0.5
    assert debiased(0.03, 0.04) == 0


def gaussians(n, rng, shift=0.0):
    points = rng.standard_normal((n, 1, 1, 3))
    points[..., 0] += shift
    return points


@pytest.mark.parametrize("n, m", [(30, 30), (30, 45), (7, 3), (1, 5)])
def test_one_resample_has_no_spread_about_the_distance(n, m):
    a, b = random_images(n, seed=13), random_images(m, seed=14) // 2
    distance = sliced_wasserstein_distance(a, b, 20, seed=3)
    assert bootstrap_interval(a, b, 20, seed=3, resamples=1) == pytest.approx((distance, distance), rel=1e-6)


def test_intervals_cover_the_known_distance_of_two_distributions():
    """Gaussians 2 apart along one axis, where the baseline hardly counts: what is covered is their own distance."""
    rng = np.random.default_rng(15)
    distance = math.sqrt(np.mean((2 * unit_directions(3, 20, seed=0)[0]) ** 2))
    pairs = [(gaussians(200, rng), gaussians(150, rng, shift=2)) for _ in range(100)]
    intervals = np.array([bootstrap_interval(a, b, 20, resamples=100) for a, b in pairs])
    assert 0.9 <= np.mean((intervals[:, 0] <= distance) & (distance <= intervals[:, 1])) <= 0.99
    narrower = np.array([bootstrap_interval(a, b, 20, resamples=100, level=0.5) for a, b in pairs])
    assert 0.35 <= np.mean((narrower[:, 0] <= distance) & (distance <= narrower[:, 1])) <= 0.65


def test_intervals_of_one_distribution_hold_the_baseline():
    rng = np.random.default_rng(16)
    pairs = [(gaussians(100, rng), gaussians(100, rng)) for _ in range(60)]
    distances = np.array([sliced_wasserstein_distance(a, b, 20) for a, b in pairs])
    lower, upper = np.array([bootstrap_interval(a, b, 20, resamples=100) for a, b in pairs]).T
    baseline = math.sqrt(np.mean(distances**2))
    assert ((lower <= distances) & (distances <= upper)).all()
    assert np.mean((lower <= baseline) & (baseline <= upper)) >= 0.95
    assert np.mean(upper - lower) < 3 * np.ptp(np.quantile(distances, [0.025, 0.975]))


def test_intervals_narrow_with_the_number_of_images_and_repeat_with_the_seed():
    a, b = quad.generate((), n=800, seed=34).images, quad.generate(("quad4",), n=800, seed=35).images
    wide, narrow = (np.ptp(bootstrap_interval(a[:n], b[:n], 50, resamples=50)) for n in (50, 800))
    assert 2 < wide / narrow < 8  # four, the root of 16, but for chance
    few = a[:20], b[:20], 20
    assert bootstrap_interval(*few, seed=1) == bootstrap_interval(*few, seed=1) != bootstrap_interval(*few, seed=2)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_no_share(level):
    with pytest.raises(ValueError, match=f"`level` is {level}"):
        bootstrap_interval(random_images(2, 0), random_images(2, 0), level=level)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (random_images(2, 0)[0], random_images(2, 0), r"shape \(4, 5, 3\)"),
        (random_images(2, 0), random_images(0, 0), r"shape \(0, 4, 5, 3\)"),
        (random_images(2, 0).astype(int), random_images(2, 0), "type int64"),
        (random_images(2, 0), random_images(2, 0, shape=(5, 4, 3)), r"\(4, 5, 3\) and \(5, 4, 3\)"),
    ],
)
def test_arrays_that_are_no_images(a, b, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein_distance(a, b)


def test_pot_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"pip install POT"):
        sliced_wasserstein_distance(random_images(2, 0), random_images(2, 0))
