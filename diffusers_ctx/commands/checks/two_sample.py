"""Can a context be distinguished from the observational one? A two-sample test by a classifier.

A logistic regression learns to tell the two from simple features of pixels, and is judged on images that it has not
seen (Lopez-Paz & Oquab 2017, arXiv 1610.06545). Accuracy at chance says that these features do not differ. An
intervention on something small, or that takes knowledge of the world to see, may differ all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

from .findings import Finding, Problem, Remark, percent
from .images import ImageTable
from .pairs import names_in_common


_LEVEL = 0.05
_MOST = 1000  # images of each context
_FOLDS = 5
_FEWEST = 6  # images of each context: with fewer, folds would hardly have one of each
_WEAK = 0.7  # accuracy: a test that could not show that much says nothing


@dataclass(frozen=True)
class TwoSampleTest:
    """How well a classifier distinguishes two contexts on held-out images.

    Attributes:
        images: of both contexts together, as many of each.
        accuracy: share of held-out images whose context was guessed right; chance is 0.5.
        p_value: how often guesses would be right as often.
        detectable: the accuracy from which on guesses would be right that often in at most 1 of 20 cases.
    """

    images: int
    accuracy: float
    p_value: float
    detectable: float


def find_untold_contexts(table: ImageTable, obs_context: str, seed: int = 0) -> tuple[list[Finding], dict]:
    """Contexts that cannot be distinguished from the observational one, and the test of every context.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    features = pixel_features(table.thumbnails)
    findings: list[Finding] = []
    tests: dict[str, TwoSampleTest | None] = {}
    for context in table.names:
        if context == obs_context:
            continue
        obs, others = table.rows(obs_context), table.rows(context)
        if min(len(obs), len(others)) < _FEWEST:
            tests[context] = None
            findings.append(
                Remark(
                    "two-sample test",
                    f"Whether {context!r} can be told from {obs_context!r} was not tested: that takes {_FEWEST} images"
                    " of each.",
                    {"context": context},
                )
            )
            continue
        scenes = np.arange(len(features))
        for first, second in names_in_common(table, obs_context, context):
            scenes[second] = first  # or the twin in the training folds would say what the other one is
        tests[context] = test = two_sample_test(features, obs, others, scenes, seed)
        if test.p_value > _LEVEL:
            findings.append(_untold(context, obs_context, test))
    return findings, tests


def two_sample_test(
    features: np.ndarray, first: np.ndarray, second: np.ndarray, groups: np.ndarray, seed: int = 0
) -> TwoSampleTest:
    """Tells rows `first` from rows `second` of features (n, d), by cross-validation.

    Args:
        features: of all images.
        first: rows of one context.
        second: rows of the other.
        groups: of all images; those of one group are held out together.
        seed: seed of the folds, and of which images of the larger context are used.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    n = min(len(first), len(second), _MOST)
    rows = np.concatenate([rng.permutation(first)[:n], rng.permutation(second)[:n]])
    labels = np.repeat([0, 1], n)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    folds = StratifiedGroupKFold(min(_FOLDS, n), shuffle=True, random_state=seed)
    told = cross_val_predict(model, features[rows], labels, groups=groups[rows], cv=folds)
    right = int((told == labels).sum())
    p_value = float(binomtest(right, 2 * n, 0.5, alternative="greater").pvalue)
    detectable = (binom.isf(_LEVEL, 2 * n, 0.5) + 1) / (2 * n)
    return TwoSampleTest(2 * n, right / (2 * n), p_value, float(detectable))


def pixel_features(thumbnails: np.ndarray) -> np.ndarray:
    """Features (n, 290) of small images (n, 32, 32, 3): colors of an 8 x 8 grid, how much brightness varies within its
    cells, a histogram of each channel, and mean and deviation of the channels and of horizontal and vertical edges."""
    pixels = thumbnails.astype(np.float32) / 255
    n, side = len(pixels), pixels.shape[1] // 8
    cells = pixels.reshape(n, 8, side, 8, side, 3)
    grey = cells.mean(axis=5)
    bins = thumbnails // 32
    histograms = np.stack([(bins == place).mean(axis=(1, 2)) for place in range(8)], axis=1)
    edges = [np.abs(np.diff(pixels.mean(axis=3), axis=axis)).reshape(n, -1) for axis in (1, 2)]
    moments = [np.stack([part.mean(axis=1), part.std(axis=1)], axis=1) for part in edges]
    return np.concatenate(
        [
            cells.mean(axis=(2, 4)).reshape(n, -1),
            grey.std(axis=(2, 4)).reshape(n, -1),
            histograms.reshape(n, -1),
            pixels.mean(axis=(1, 2)),
            pixels.std(axis=(1, 2)),
            *moments,
        ],
        axis=1,
    )


def _untold(context: str, obs_context: str, test: TwoSampleTest) -> Finding:
    figures = (
        f"{percent(test.accuracy)} of {test.images} held-out images, where chance is 50 % (p = {test.p_value:.2f})"
    )
    details = {"context": context, **vars(test)}
    if test.detectable > _WEAK:
        return Remark(
            "two-sample test",
            f"Whether {context!r} can be told from {obs_context!r} is open: {figures}. With so few images, only"
            f" {percent(test.detectable)} or more would show it.",
            details,
        )
    return Problem(
        "two-sample test",
        f"{context!r} cannot be told from {obs_context!r} by simple features of pixels: {figures}. If you do not see a"
        " difference either, the adapter has nothing to learn; what is small or takes knowledge to see may escape"
        " these features.",
        details,
    )
