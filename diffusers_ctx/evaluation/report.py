"""From images to the metrics of a report, and from metrics to its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .conformity import composition_gap
from .counterfactual import counterfactual_error
from .kernel_distance import kernel_distance
from .sliced_wasserstein import bootstrap_interval, debiased, sliced_wasserstein_distance


Metrics = dict[str, Any]  # of one context, by name

_AVERAGED = ("swd", "floor", "debiased", "kid", "kid_floor")
_SUBSETS = 100
_LARGEST_SUBSET = 1000  # as usual for the kernel distance


def measure_context(
    samples: np.ndarray,
    real: np.ndarray,
    real_b: np.ndarray,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> Metrics:
    """Distance of samples to the distribution of one context, beside the real-vs-real baseline.

    All three sets have the same number of images, as the distance and its baseline depend on it.

    Args:
        samples: generated images (n, H, W, C), uint8 or float in [0, 1].
        real: held-out images (n, H, W, C), which the samples are compared with.
        real_b: other held-out images (n, H, W, C) of the same context, for the baseline.
        features: maps images (n, H, W, C) to features (n, d) for the kernel distance, which is left out without it.
        seed: seed of the projections, the bootstrap and the subsets.

    Returns:
        `n`; `swd`, the sliced Wasserstein distance of samples to `real`; its bootstrap `interval` of 95 %; `floor`,
        the real-vs-real baseline, which is the distance of `real_b` to `real`; `debiased`, the distance corrected for
        the baseline; and with `features`, `kid`, the kernel distance of samples to `real`, its standard error
        `kid_error`, and its baseline `kid_floor`. Lower is better: at best `swd` is near `floor`, and `debiased` and
        `kid` are near 0; `kid` may be negative.

    Raises:
        ImportError: if POT or, with `features`, scikit-learn is not installed.
        ValueError: if the sets differ in size or have fewer than 2 images, or are no images of one shape.
    """
    sizes = {len(samples), len(real), len(real_b)}
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError(
            f"Got {len(samples)} samples, {len(real)} and {len(real_b)} real images; give as many of each, 2 or more."
        )
    n = len(samples)
    distance = sliced_wasserstein_distance(samples, real, seed=seed)
    floor = sliced_wasserstein_distance(real_b, real, seed=seed)
    metrics: Metrics = {
        "n": n,
        "swd": distance,
        "interval": list(bootstrap_interval(samples, real, seed=seed)),
        "floor": floor,
        "debiased": debiased(distance, floor),
    }
    if features is None:
        return metrics
    size = min(max(2, n // 2), _LARGEST_SUBSET)  # below n, or every subset would be the same
    of_samples, of_real, of_real_b = map(features, (samples, real, real_b))
    metrics["kid"], metrics["kid_error"] = kernel_distance(of_samples, of_real, size, _SUBSETS, seed)
    metrics["kid_floor"], _ = kernel_distance(of_real_b, of_real, size, _SUBSETS, seed)
    return metrics


def measure_counterfactuals(
    images: np.ndarray,
    unchanged: Mapping[int, np.ndarray],
    undone: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Metrics:
    """Axioms of counterfactuals that need no attributes: composition and reversibility; see `counterfactual_error`.

    Args:
        images: observational images (n, H, W, C).
        unchanged: counterfactuals without an intervention, by the number of rounds; 0 rounds are the autoencoder's
            reconstructions.
        undone: by concept, the counterfactuals under its intervention, and their counterfactuals back without it.

    Returns:
        `n`; `composition`, by rounds; `reversibility`, by concept; and `change`, by concept, the distance that the
        intervention moved the images: with a change of 0, reversibility means nothing. All are mean absolute errors of
        pixels in [0, 1]; lower is better, except for `change`.

    Raises:
        ValueError: if these are not images of the same number and shape.
    """
    return {
        "n": len(images),
        "composition": {rounds: counterfactual_error(after, images) for rounds, after in unchanged.items()},
        "change": {name: counterfactual_error(there, images) for name, (there, _) in undone.items()},
        "reversibility": {name: counterfactual_error(back, images) for name, (_, back) in undone.items()},
    }


def summarize(metrics: Mapping[str, Metrics], interventions: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Means over contexts with one intervention (`concept`) and with several (`composition`), and their gap.

    Args:
        metrics: results of `measure_context`, by context.
        interventions: interventions of each context; the observational context, with none, is in no mean.

    Returns:
        `concept` and `composition`, each with `contexts` (their number), `told` (of how many the distance can be told
        from the baseline) and the means of `swd`, `floor`, `debiased` and, where measured, `kid` and `kid_floor`;
        `gap`, the composition gap of `debiased`, see `composition_gap`. A group without contexts is left out, and the
        gap with it.
    """
    groups = {
        "concept": [metrics[name] for name in metrics if len(interventions[name]) == 1],
        "composition": [metrics[name] for name in metrics if len(interventions[name]) > 1],
    }
    summary: dict[str, Any] = {
        group: {"contexts": len(members), "told": sum(not reaches_floor(member) for member in members)}
        | {key: float(np.mean([member[key] for member in members])) for key in _AVERAGED if key in members[0]}
        for group, members in groups.items()
        if members
    }
    if len(summary) == 2:
        single, pair = ([member["debiased"] for member in members] for members in groups.values())
        summary["gap"] = composition_gap(single, pair)
    return summary


def reaches_floor(metrics: Metrics) -> bool:
    """Whether the interval of a distance reaches down to its baseline: with so few images, it may be no distance."""
    return "interval" in metrics and metrics["interval"][0] <= metrics["floor"]


def render_markdown(results: Mapping[str, Any]) -> str:
    """Tables of the metrics, in Markdown that reads well as plain text.

    Args:
        results: `contexts` (results of `measure_context`, by context), the result of `summarize`, and optionally
            `counterfactuals` (the result of `measure_counterfactuals`).
    """
    contexts = results["contexts"]
    means = [
        (f"mean of {results[group]['contexts']}, {group}", results[group])
        for group in ("concept", "composition")
        if group in results
    ]
    columns = {
        name: column for name, column in _COLUMNS.items() if any(column(metrics) for metrics in contexts.values())
    }
    rows = [[name, *(column(metrics) for column in columns.values())] for name, metrics in [*contexts.items(), *means]]
    lines = [*_table(["context", *columns], rows), ""]
    if "gap" in results:
        told = all(results.get(group, {}).get("told", 1) for group in ("concept", "composition"))
        gap = _number("gap")(results) if told else _INCONCLUSIVE
        lines += [f"Composition gap of the debiased SWD: {gap}", ""]
    lines += [_LEGEND, ""]
    if "counterfactuals" in results:
        lines += _counterfactual_tables(results["counterfactuals"])
    return "\n".join(lines)


def _counterfactual_tables(measured: Metrics) -> list[str]:
    rounds = [[str(number), f"{error:.4f}"] for number, error in measured["composition"].items()]
    concepts = [
        [name, *(f"{measured[key][name]:.4f}" for key in ("reversibility", "change"))] for name in measured["change"]
    ]
    return [
        f"Counterfactuals of {measured['n']} observational images, mean absolute error of pixels in [0, 1]; 0 rounds"
        " are the autoencoder's reconstructions.",
        "",
        *_table(["rounds without intervention", "error"], rounds),
        "",
        *_table(["intervention", "error when undone", "change when made"], concepts),
        "",
    ]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are numbers.

    Written here because pandas' `to_markdown` needs tabulate, which is no dependency.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "| "
        + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


def _number(key: str, digits: int = 3) -> Callable[[Mapping[str, Any]], str]:
    return lambda metrics: f"{metrics[key]:.{digits}f}" if key in metrics else ""


def _debiased(metrics: Metrics) -> str:
    is_inconclusive = reaches_floor(metrics) or metrics.get("told") == 0
    return _INCONCLUSIVE if is_inconclusive else _number("debiased")(metrics)


_INCONCLUSIVE = "inconclusive"
_COLUMNS: dict[str, Callable[[Metrics], str]] = {
    "n": lambda metrics: str(metrics.get("n", "")),
    "SWD": _number("swd"),
    "95 % interval": lambda metrics: " to ".join(f"{end:.3f}" for end in metrics.get("interval", ())),
    "real vs real": _number("floor"),
    "debiased": _debiased,
    "KID": _number("kid"),
    "KID, real vs real": _number("kid_floor"),
}
_LEGEND = (
    "Lower is better. Each context's held-out images are split into two halves of n. SWD: sliced Wasserstein distance"
    " of n samples to the first half. Real vs real: distance of the second half to the first, the baseline that"
    " samples of the true distribution would have. Debiased: the SWD corrected for the baseline; inconclusive"
    " where the interval reaches down to the baseline, and more held-out images would help. KID: kernel distance,"
    " with expectation 0 for samples of the true distribution, on the chosen features; on the default ones, the"
    " autoencoder's latents, it cannot be compared with published KIDs. The baseline is that of one split; with few"
    " images it may be off by a fifth, and debiased distances near it too: compare adapters on the same images."
)
