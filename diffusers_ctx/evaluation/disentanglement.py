"""Whether inferred codes match the true factors, one to one.

Codes (n, d) are inferred from n images, factors (n, f) are the true continuous values; n at least 10, d and f at least
2. A code may be constant, as a model may leave it unused; a factor may not. Higher is better in all metrics.

Each column counts as a code of its own. A node of several dimensions is thus spread over codes, which lowers
completeness, MIG, SAP and mostly MCC, and says nothing against the model: look at disentanglement then.
Where the factors depend on each other, MIG and SAP are below 1 for the true factors themselves.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata


_BINS = 20


class DCI(NamedTuple):
    """Disentanglement, completeness and informativeness, each 1 at best."""

    disentanglement: float
    completeness: float
    informativeness: float


def dci(codes: np.ndarray, factors: np.ndarray, seed: int = 0) -> DCI:
    """Disentanglement, completeness and informativeness (Eastwood and Williams, 2018, ICLR, section 2).

    A random forest, fitted on three quarters of the images, predicts each factor from all codes and rates how much
    each code matters for it. *Disentanglement* of a code is 1 minus the entropy, with logarithms to the base f, of
    what it matters for; the mean weighs codes by what they matter in all. *Completeness* of a factor is 1 minus the
    entropy, to the base d, of which codes matter for it; the mean is plain. Both are in [0, 1]. *Informativeness* is
    the mean R² of the predictions of the other quarter: at most 1, and 0 or slightly below for codes that tell
    nothing. The paper gives it as error relative to a guess of the mean, the root of 1 - R², lower being better.

    Args:
        codes: codes (n, d).
        factors: factors (n, f).
        seed: seed of the split and of the forest.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if codes and factors are not as this module takes them.
    """
    _require_sklearn()
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import train_test_split

    codes, factors = _checked(codes, factors)
    codes, held_out_codes, factors, held_out_factors = train_test_split(codes, factors, random_state=seed)
    importances, scores = [], []
    for factor, held_out in zip(factors.T, held_out_factors.T):
        forest = RandomForestRegressor(random_state=seed).fit(codes, factor)
        importances.append(forest.feature_importances_)
        scores.append(forest.score(held_out_codes, held_out))
    matrix = np.stack(importances, axis=1)
    return DCI(
        disentanglement=float(_shares(matrix.sum(axis=1)) @ _concentration(matrix)),
        completeness=float(_concentration(matrix.T).mean()),
        informativeness=float(np.mean(scores)),
    )


def mutual_information_gap(codes: np.ndarray, factors: np.ndarray) -> float:
    """MIG: how much more information the best code has about a factor than the second best.

    The mean over the factors of the difference of their two highest mutual informations with a code, divided by the
    factor's entropy (Chen et al., 2018, arXiv 1802.04942, section 4); in [0, 1]. Codes and factors are continuous, so
    both are put in 20 bins of equal frequency, which makes it invariant under monotone maps of either. Finite samples
    add some 361 / 2n nats to what two independent variables share, which lowers the best value from 1 to about 0.94
    for n = 1,000 and still more with many codes.

    Args:
        codes: codes (n, d).
        factors: factors (n, f).

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if codes and factors are not as this module takes them.
    """
    _require_sklearn()
    from sklearn.metrics import mutual_info_score

    codes, factors = (_binned(values) for values in _checked(codes, factors))
    information = np.array([[mutual_info_score(factor, code) for factor in factors.T] for code in codes.T])
    entropy = np.array([mutual_info_score(factor, factor) for factor in factors.T])
    return float(np.mean(_gap(information) / entropy))


def separated_attribute_predictability(codes: np.ndarray, factors: np.ndarray) -> float:
    """SAP: how much better the best code predicts a factor than the second best.

    The mean over the factors of the difference of the two highest R² of a linear regression of the factor on one code
    (Kumar et al., 2018, arXiv 1711.00848, section 3); in [0, 1].

    Args:
        codes: codes (n, d).
        factors: factors (n, f).

    Raises:
        ValueError: if codes and factors are not as this module takes them.
    """
    return float(np.mean(_gap(_correlations(*_checked(codes, factors)) ** 2)))


def mean_correlation_coefficient(
    codes: np.ndarray, factors: np.ndarray, method: Literal["pearson", "spearman"] = "pearson"
) -> float:
    """MCC: the mean absolute correlation of factors and codes under the best one-to-one assignment.

    Used since Hyvärinen and Morioka (2016, arXiv 1605.06336) for recovery up to order and scale, or, by ranks, up to
    order and monotone maps. In [0, 1]; a factor that is left without a code counts as 0. Factors that are correlated
    among each other raise what entangled codes reach.

    Args:
        codes: codes (n, d).
        factors: factors (n, f).
        method: correlation of the values, or of their ranks.

    Raises:
        ValueError: if codes and factors are not as this module takes them, or the method is another.
    """
    codes, factors = _checked(codes, factors)
    if method not in ("pearson", "spearman"):
        raise ValueError(f"`method` is {method!r}; choose 'pearson' or 'spearman'.")
    if method == "spearman":
        codes, factors = rankdata(codes, axis=0), rankdata(factors, axis=0)
    correlations = np.abs(_correlations(codes, factors))
    assigned = linear_sum_assignment(correlations, maximize=True)
    return float(correlations[assigned].sum() / factors.shape[1])


def _checked(codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in double precision, if they are as this module takes them."""
    fit = codes.ndim == factors.ndim == 2 and len(codes) == len(factors)
    if not fit or len(codes) < 10 or min(codes.shape[1], factors.shape[1]) < 2:
        raise ValueError(
            f"Got codes {codes.shape} and factors {factors.shape}; give two matrices (n, d) and (n, f) of the same n "
            "images, n at least 10, d and f at least 2."
        )
    if not (np.isfinite(codes).all() and np.isfinite(factors).all()):
        raise ValueError("Codes and factors must be finite numbers; leave out the images where they are not.")
    constant = np.flatnonzero(np.ptp(factors, axis=0) == 0)
    if constant.size:
        raise ValueError(f"The factors {constant.tolist()} do not vary; leave them out.")
    return codes.astype(np.float64), factors.astype(np.float64)


def _concentration(importances: np.ndarray) -> np.ndarray:
    """1 minus the entropy of each row, as a distribution, to the base of its length; 0 for a row of zeros."""
    shares = _shares(importances)
    return 1 + (shares * np.log(shares)).sum(axis=-1) / np.log(shares.shape[-1])


def _shares(importances: np.ndarray) -> np.ndarray:
    """What each is of the sum over the last axis; the same for all if all are zero."""
    positive = importances + 1e-12
    return positive / positive.sum(axis=-1, keepdims=True)


def _gap(scores: np.ndarray) -> np.ndarray:
    """Difference (f,) of the two highest in each column of scores (d, f)."""
    ordered = np.sort(scores, axis=0)
    return ordered[-1] - ordered[-2]


def _correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Pearson correlations (d, f), 0 for a constant code."""
    varies = np.ptp(codes, axis=0)[:, None] > 0
    codes, factors = (values - values.mean(axis=0) for values in (codes, factors))
    norms = np.linalg.norm(codes, axis=0)[:, None] * np.linalg.norm(factors, axis=0)
    return np.divide(codes.T @ factors, norms, out=np.zeros_like(norms), where=varies)


def _binned(values: np.ndarray) -> np.ndarray:
    """The bin of each value, by its rank; equal values share a bin."""
    return ((rankdata(values, axis=0) - 0.5) / len(values) * _BINS).astype(int)


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("DCI and MIG need scikit-learn; run `pip install scikit-learn`.") from error
