"""From images to the figures of a report, and from figures to its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .conformity import composition_gap
from .counterfactual import counterfactual_composition, counterfactual_error, counterfactual_reversibility
from .kernel_distance import kernel_distance
from .sliced_wasserstein import bootstrap_interval, debiased, sliced_wasserstein_distance


Figures = dict[str, Any]  # of one context, by name

_AVERAGED = ("swd", "floor", "debiased", "kid", "kid_floor")
_SUBSETS = 100
_LARGEST_SUBSET = 1000  # as usual for the kernel distance


def measure_context(
    samples: np.ndarray,
    real: np.ndarray,
    again: np.ndarray,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
    seed: int = 0,
) -> Figures:
    """How far samples are from the law of one context, beside the floor: what real images of it are apart.

    All three sets have the same number of images, since both distance and floor depend on it.

    Args:
        samples: generated images (n, H, W, C), uint8 or float in [0, 1].
        real: held-out images (n, H, W, C), which the samples are compared with.
        again: other held-out images (n, H, W, C) of the same context, which give the floor.
        features: maps images (n, H, W, C) to features (n, d) for the kernel distance; without it, that is left out.
        seed: seed of the projections, the bootstrap and the subsets.

    Returns:
        `n`; `swd`, the sliced Wasserstein distance of samples to `real`; its bootstrap `interval` of 95 %; `floor`,
        the distance of `again` to `real`; `debiased`, the distance without the floor; and with `features`, `kid`, the
        kernel distance of samples to `real`, its standard error `kid_error`, and `kid_floor`, that of `again` to
        `real`. Lower is better: at best `swd` is near `floor`, and `debiased` and `kid` near 0, `kid` on either side.

    Raises:
        ImportError: if what a distance needs is not installed.
        ValueError: if the sets differ in size or have fewer than 2 images, or are no images of one shape.
    """
    sizes = {len(samples), len(real), len(again)}
    if len(sizes) > 1 or min(sizes) < 2:
        raise ValueError(
            f"Got {len(samples)} samples, {len(real)} and {len(again)} real images; give as many of each, 2 or more."
        )
    n = len(samples)
    distance = sliced_wasserstein_distance(samples, real, seed=seed)
    floor = sliced_wasserstein_distance(again, real, seed=seed)
    figures: Figures = {
        "n": n,
        "swd": distance,
        "interval": list(bootstrap_interval(samples, real, seed=seed)),
        "floor": floor,
        "debiased": debiased(distance, floor),
    }
    if features is None:
        return figures
    size = min(max(2, n // 2), _LARGEST_SUBSET)  # below n, or every subset would be the same
    of_samples, of_real, of_again = map(features, (samples, real, again))
    figures["kid"], figures["kid_error"] = kernel_distance(of_samples, of_real, size, _SUBSETS, seed)
    figures["kid_floor"], _ = kernel_distance(of_again, of_real, size, _SUBSETS, seed)
    return figures


def measure_counterfactuals(
    images: np.ndarray,
    unchanged: Mapping[int, np.ndarray],
    undone: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Figures:
    """Axioms of counterfactuals that need no attributes; see `counterfactual`. All are mean absolute errors of pixels.

    Args:
        images: observational images (n, H, W, C).
        unchanged: counterfactuals without an intervention, by the number of rounds that they went through; after 0
            rounds, what the autoencoder alone makes of the images.
        undone: by concept, the counterfactuals under its intervention, and of those the ones back without it.

    Returns:
        `n`; `composition`, by rounds; `reversibility`, by concept; and beside it `change`, how far the intervention
        moved the images: with a change of 0, reversibility is for nothing.

    Raises:
        ValueError: if these are not images of the same number and shape.
    """
    return {
        "n": len(images),
        "composition": {rounds: counterfactual_composition(images, after) for rounds, after in unchanged.items()},
        "change": {name: float(counterfactual_error(there, images)) for name, (there, _) in undone.items()},
        "reversibility": {name: counterfactual_reversibility(images, back) for name, (_, back) in undone.items()},
    }


def summarize(figures: Mapping[str, Figures], interventions: Mapping[str, Sequence[str]]) -> dict[str, Figures]:
    """Means over contexts with one intervention (`concept`) and with several (`composition`), and their gap.

    Args:
        figures: what `measure_context` returned, by context.
        interventions: what each context intervenes on; one with none, the observational context, is in no mean.

    Returns:
        `concept` and `composition`, each with `contexts` (their number) and the means of `swd`, `floor`, `debiased`
        and, where measured, `kid` and `kid_floor`; `gap`, the composition gap of `debiased`, see `composition_gap`. A
        group without contexts is left out, and the gap with it.
    """
    groups = {
        "concept": [figures[name] for name in figures if len(interventions[name]) == 1],
        "composition": [figures[name] for name in figures if len(interventions[name]) > 1],
    }
    summary: dict[str, Any] = {
        group: {"contexts": len(members)}
        | {key: float(np.mean([figure[key] for figure in members])) for key in _AVERAGED if key in members[0]}
        for group, members in groups.items()
        if members
    }
    if len(summary) == 2:
        single, pair = ([figure["debiased"] for figure in members] for members in groups.values())
        summary["gap"] = composition_gap(single, pair)
    return summary


def render_markdown(results: Mapping[str, Any]) -> str:
    """The figures as tables, which read well in Markdown and as they are.

    Args:
        results: `contexts` (what `measure_context` returned, by context), all that `summarize` returned, and, where
            there are any, `counterfactuals` (what `measure_counterfactuals` returned).
    """
    contexts = results["contexts"]
    means = {
        f"mean of {results[group]['contexts']}, {group}": results[group]
        for group in ("concept", "composition")
        if group in results
    }
    columns = {
        name: column for name, column in _COLUMNS.items() if any(column(figures) for figures in contexts.values())
    }
    rows = [[name, *(column(figures) for column in columns.values())] for name, figures in (contexts | means).items()]
    lines = [*_table(["context", *columns], rows), ""]
    if "gap" in results:
        lines += [f"Composition gap of the debiased SWD: {results['gap']:.3f}", ""]
    lines += [_LEGEND, ""]
    if "counterfactuals" in results:
        lines += _counterfactual_tables(results["counterfactuals"])
    return "\n".join(lines)


def draw_strengths(strengths: np.ndarray, names: Sequence[str]) -> Any:
    """A heat map of a causal layer's strengths, as a `matplotlib.figure.Figure`.

    Args:
        strengths: strengths (N, N), row = effect, column = cause.
        names: names of the N nodes.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing the graph needs matplotlib; run `pip install matplotlib`.") from error
    size = 2 + 0.4 * len(names)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(strengths, cmap="Blues", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="cause", ylabel="effect")
    figure.colorbar(picture, label="strength of the edge")
    return figure


def _counterfactual_tables(measured: Figures) -> list[str]:
    rounds = [[str(number), f"{error:.4f}"] for number, error in measured["composition"].items()]
    concepts = [
        [name, *(f"{measured[key][name]:.4f}" for key in ("reversibility", "change"))] for name in measured["change"]
    ]
    return [
        f"Counterfactuals of {measured['n']} observational images, mean absolute error of pixels in [0, 1]. After 0"
        " rounds, what the autoencoder alone makes of them.",
        "",
        *_table(["rounds without intervention", "error"], rounds),
        "",
        *_table(["intervention", "error when undone", "change when made"], concepts),
        "",
    ]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are figures."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "| "
        + " | ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        + " |"
        for row in (header, *rows)
    ]
    rule = "|" + "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


def _number(key: str, digits: int = 3) -> Callable[[Figures], str]:
    return lambda figures: f"{figures[key]:.{digits}f}" if key in figures else ""


_COLUMNS: dict[str, Callable[[Figures], str]] = {
    "n": lambda figures: str(figures.get("n", "")),
    "SWD": _number("swd"),
    "95 % interval": lambda figures: " to ".join(f"{end:.3f}" for end in figures.get("interval", ())),
    "floor": _number("floor"),
    "debiased": _number("debiased"),
    "KID": _number("kid"),
    "KID floor": _number("kid_floor"),
}
_LEGEND = (
    "Each context's held-out images are split in two halves of n. SWD: sliced Wasserstein distance of n samples to the"
    " first half; floor: that of the second half to the first, which samples of the true law would have; debiased: the"
    " SWD without the floor; KID: kernel distance, of expectation 0 for samples of the true law, on the features that"
    " were chosen (by default the autoencoder's latents, not to be held against published figures). Lower is better."
    " The floor is that of one split, and other images would have given another; with few images it may be off by a"
    " fifth, and debiased distances near it with it: hold adapters against one another on the same images."
)
