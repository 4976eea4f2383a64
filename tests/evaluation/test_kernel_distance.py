import numpy as np
import pytest

from diffusers_ctx.evaluation import kernel_distance


def features(n, d=3, seed=0, shift=0.0):
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def kernel(x, y):
    return (sum(x[i] * y[i] for i in range(len(x))) / len(x) + 1) ** 3


def recomputed(x, y):
    """The unbiased estimate, one pair at a time."""
    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(u, v) for u in x for v in y) / (n * m)


def test_equals_a_double_loop_where_a_subset_is_all():
    a, b = features(20, seed=1), features(20, seed=2, shift=0.5)
    mean, error = kernel_distance(a, b, subset_size=20, num_subsets=3)
    assert mean == pytest.approx(recomputed(a, b), rel=1e-9)
    assert error == pytest.approx(0, abs=1e-12)


def test_mean_and_error_are_those_of_independent_subsets():
    a, b = features(40, seed=3), features(50, seed=4, shift=0.5)
    rng = np.random.default_rng(5)
    estimates = [recomputed(a[rng.permutation(40)[:10]], b[rng.permutation(50)[:10]]) for _ in range(200)]
    mean, error = kernel_distance(a, b, subset_size=10, num_subsets=400)
    own_error = np.std(estimates) / np.sqrt(200)
    assert abs(mean - np.mean(estimates)) < 4 * np.hypot(error, own_error)
    assert error == pytest.approx(own_error / np.sqrt(2), rel=0.3)


def test_known_value_of_two_gaussians():
    """One dimension, N(0, 1) and N(1, 1): with the moments up to the third, 4 + 32 - 2 * 7."""
    mean, error = kernel_distance(features(20000, 1, 6), features(20000, 1, 7, 1.0), subset_size=1000, num_subsets=20)
    assert mean == pytest.approx(22, rel=0.06)
    assert error < 1


def test_is_zero_on_average_for_one_law_however_few_images():
    estimates = [kernel_distance(features(8, seed=s), features(8, seed=s + 1000), 8, 2)[0] for s in range(1000)]
    assert abs(np.mean(estimates)) < 3 * np.std(estimates) / np.sqrt(1000)
    assert min(estimates) < 0
    assert np.std(estimates) / np.sqrt(1000) < 0.1  # so that the biased estimate, some 0.9 larger, would be found


def test_grows_with_the_shift_and_repeats_with_the_seed():
    near, far = (kernel_distance(features(300, 5, 8), features(300, 5, 9, s), 100, 10)[0] for s in (0.2, 0.8))
    assert 0 < near < far
    pair = features(60, seed=10), features(60, seed=11)
    assert kernel_distance(*pair, 20, 5, seed=1) == kernel_distance(*pair, 20, 5, seed=1)
    assert kernel_distance(*pair, 20, 5, seed=1) != kernel_distance(*pair, 20, 5, seed=2)


def test_bytes_are_taken_as_numbers():
    a, b = (np.random.default_rng(s).integers(0, 256, (30, 4), dtype=np.uint8) for s in (12, 13))
    assert kernel_distance(a, b, 30, 2)[0] == pytest.approx(recomputed(a.astype(float), b.astype(float)), rel=1e-9)


@pytest.mark.parametrize(
    "a, b, subset_size, num_subsets, message",
    [
        (features(5), features(5, d=4), 5, 2, r"\(5, 3\) and \(5, 4\)"),
        (features(5)[0], features(5), 5, 2, r"shape \(3,\)"),
        (features(5), features(4), 5, 2, "`subset_size` from 2 to 4"),
        (features(5), features(5), 1, 2, "`subset_size` from 2 to 5"),
        (features(5), features(5), 5, 1, "`num_subsets` of at least 2"),
    ],
)
def test_features_that_do_not_fit(a, b, subset_size, num_subsets, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(a, b, subset_size, num_subsets)
