import itertools
import sys

import numpy as np
import pytest
from scipy.stats import entropy, spearmanr
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression

from diffusers_ctx.evaluation import (
    dci,
    mean_correlation_coefficient,
    mutual_information_gap,
    separated_attribute_predictability,
)


METRICS = (dci, mutual_information_gap, separated_attribute_predictability, mean_correlation_coefficient)
HALF_TURN = np.array([[1, 1], [1, -1]]) / np.sqrt(2)


def factors(n=1000, f=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, f))


def mixed(n=400, seed=1):
    """Codes that each depend on each factor, in no simple way."""
    true = factors(n, 3, seed)
    return np.tanh(true @ factors(3, 4, seed + 1)) + 0.1 * factors(n, 4, seed + 2), true


@pytest.mark.parametrize("codes", [lambda f: f, lambda f: -3 * f[:, ::-1] + 5, lambda f: np.c_[f, np.zeros(len(f))]])
def test_true_factors_are_perfect_in_any_order_and_scale_and_beside_a_dead_code(codes):
    true = factors()
    inferred = codes(true)
    assert dci(inferred[:400], true[:400]) == pytest.approx((1, 1, 1), abs=0.02)
    assert mutual_information_gap(inferred, true) == pytest.approx(1, abs=0.08)
    assert separated_attribute_predictability(inferred, true) == pytest.approx(1, abs=0.01)
    for method in ("pearson", "spearman"):
        assert mean_correlation_coefficient(inferred, true, method) == pytest.approx(1)


def test_noise_tells_nothing():
    noise, true = factors(seed=1), factors(seed=2)
    disentanglement, completeness, informativeness = dci(noise[:400], true[:400])
    assert (disentanglement, completeness) == pytest.approx((0, 0), abs=0.03)
    assert -0.3 < informativeness < 0.05
    for metric in METRICS[1:]:
        assert 0 <= metric(noise, true) < 0.1


def test_a_collapsed_posterior_tells_nothing():
    dead, true = np.full((1000, 3), 0.1), factors()
    assert dci(dead[:100], true[:100])[:2] == pytest.approx((0, 0))
    assert dci(dead[:100], true[:100]).informativeness < 0.01
    for metric in METRICS[1:]:
        assert metric(dead, true) == 0


def test_codes_turned_by_45_degrees_hold_all_and_separate_nothing():
    true = factors(f=2, seed=3)
    codes = true @ HALF_TURN
    disentanglement, completeness, informativeness = dci(codes, true)
    assert (disentanglement, completeness) == pytest.approx((0, 0), abs=0.05)
    assert informativeness > 0.95
    assert mutual_information_gap(codes, true) == pytest.approx(0, abs=0.03)
    assert separated_attribute_predictability(codes, true) == pytest.approx(0, abs=0.05)
    assert mean_correlation_coefficient(codes, true) == pytest.approx(np.sqrt(0.5), abs=0.03)


def test_a_factor_in_two_codes_is_disentangled_and_incomplete():
    true = factors(400)
    codes = np.repeat(true, 2, axis=1) + 0.1 * factors(400, 6, seed=4)
    disentanglement, completeness, _ = dci(codes, true)
    assert disentanglement > 0.95
    assert completeness == pytest.approx(1 - np.log(2) / np.log(6), abs=0.04)
    assert mutual_information_gap(codes, true) < 0.05
    assert separated_attribute_predictability(codes, true) < 0.05
    assert mean_correlation_coefficient(codes, true) > 0.98


def test_monotone_maps_change_neither_information_nor_ranks():
    true = factors()
    codes = np.exp(2 * true)
    assert mutual_information_gap(codes, true) == mutual_information_gap(true, true)
    assert mean_correlation_coefficient(codes, true, "spearman") == pytest.approx(1)
    assert mean_correlation_coefficient(codes, true, "pearson") < 0.7


def test_dci_equals_a_recomputation_by_other_forests():
    codes, true = mixed(400)
    forests = [RandomForestRegressor(random_state=7).fit(codes[:300], factor) for factor in true[:300].T]
    matrix = np.array([forest.feature_importances_ for forest in forests]).T
    of_codes, of_factors = (1 - entropy(m, axis=0) / np.log(len(m)) for m in (matrix.T, matrix))
    expected = np.average(of_codes, weights=matrix.sum(axis=1)), np.mean(of_factors)
    result = dci(codes, true)
    assert result[:2] == pytest.approx(expected, abs=0.05)
    scores = [forest.score(codes[300:], factor) for forest, factor in zip(forests, true[300:].T)]
    assert result.informativeness == pytest.approx(np.mean(scores), abs=0.05)
    assert dci(codes[:100], true[:100], seed=1) == dci(codes[:100], true[:100], seed=1)
    assert dci(codes[:100], true[:100], seed=1) != dci(codes[:100], true[:100], seed=2)


def test_mutual_information_gap_equals_a_recomputation_by_histograms():
    codes, true = mixed()
    quantiles = np.linspace(0, 1, 21)
    information = np.empty((4, 3))
    for i, j in np.ndindex(4, 3):
        bins = [np.quantile(values, quantiles) for values in (codes[:, i], true[:, j])]
        joint = np.histogram2d(codes[:, i], true[:, j], bins)[0] / len(codes)
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        information[i, j] = np.sum(joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0]))
    gaps = [sorted(column)[-1] - sorted(column)[-2] for column in information.T]
    assert mutual_information_gap(codes, true) == pytest.approx(np.mean(gaps) / np.log(20), rel=1e-9)


def test_mutual_information_gap_of_few_values():
    rng = np.random.default_rng(5)
    true = rng.integers(0, [2, 5], (2000, 2)).astype(float)
    true[:, 0] = true[:, 0] < 0.5
    assert mutual_information_gap(true, true) == pytest.approx(1, abs=0.01)
    rare = np.c_[np.arange(2000) < 20, true[:, 1]].astype(float)
    assert mutual_information_gap(rare, rare) == pytest.approx(1, abs=0.05)


def test_predictability_equals_linear_regressions():
    codes, true = mixed()
    scores = [
        [LinearRegression().fit(code[:, None], factor).score(code[:, None], factor) for code in codes.T]
        for factor in true.T
    ]
    gaps = [sorted(row)[-1] - sorted(row)[-2] for row in scores]
    assert separated_attribute_predictability(codes, true) == pytest.approx(np.mean(gaps), rel=1e-9)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_mean_correlation_is_the_best_of_all_assignments(method):
    codes, true = mixed()
    if method == "pearson":
        correlations = np.abs(np.corrcoef(codes.T, true.T)[:4, 4:])
    else:
        correlations = np.abs(spearmanr(codes, true).statistic[:4, 4:])
    best = max(sum(correlations[i, j] for j, i in enumerate(order)) for order in itertools.permutations(range(4), 3))
    assert mean_correlation_coefficient(codes, true, method) == pytest.approx(best / 3, rel=1e-9)


def test_a_factor_without_a_code_counts_as_nothing():
    true = factors()
    assert mean_correlation_coefficient(true[:, :2], true) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "codes, true, message",
    [
        (factors(20), factors(19), r"codes \(20, 3\) and factors \(19, 3\)"),
        (factors(9), factors(9), "n at least 10"),
        (factors(20, 1), factors(20), "d and f at least 2"),
        (factors(20), factors(20, 1), "d and f at least 2"),
        (factors(20)[0], factors(20), r"codes \(3,\)"),
        (factors(20) * np.nan, factors(20), "finite"),
        (factors(20), factors(20) * [1, 0, 1], r"factors \[1\] do not vary"),
    ],
)
def test_codes_and_factors_that_do_not_fit(metric, codes, true, message):
    with pytest.raises(ValueError, match=message):
        metric(codes, true)


def test_an_unknown_correlation():
    with pytest.raises(ValueError, match="'kendall'; choose 'pearson' or 'spearman'"):
        mean_correlation_coefficient(factors(20), factors(20), "kendall")


@pytest.mark.parametrize("metric", METRICS[:2])
def test_scikit_learn_is_optional(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        metric(factors(20), factors(20))
