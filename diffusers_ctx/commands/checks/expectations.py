"""What to expect of a number of images: what training does with it, and what was measured."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ...data.held_out import hold_out


class Measured(NamedTuple):
    """What an adapter achieved with this many images of each context on quad.

    Attributes:
        images: images of each context.
        auroc: area under the ROC curve of the learned graph's edges; 0.5 is a guess, 1 is best.
        pairs: debiased sliced Wasserstein distance of pairs that training never showed; 0 is best.
    """

    images: int
    auroc: float
    pairs: float


# docs/results.md#steps-and-images; a test holds them against benchmarks/results
MEASURED = (
    Measured(100, 0.55, 0.121),
    Measured(300, 0.86, 0.067),
    Measured(1000, 1.00, 0.029),
    Measured(4000, 1.00, 0.023),
)


def expectations(contexts: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Sentences about a training on images of these contexts with these captions, one a row."""
    # of the training, whose constants they are, and which imports a lot
    from ...training.concepts.caption_fit import LEAST_CAPTIONED
    from ...training.config import ContextConfig
    from ...training.diffusion.noise_trial import trial_images
    from ...training.diffusion.validation import HELD_OUT_SEED

    smallest, held_out = min(Counter(contexts).values()), trial_images(contexts)
    learned, _ = hold_out(contexts, held_out, HELD_OUT_SEED)
    captioned = sum(bool(captions[row]) for row in learned)
    lines = [
        f"The smallest context has {smallest} images: the concepts are learned in"
        f" {ContextConfig().concept_steps_for([contexts[row] for row in learned])} steps by default."
    ]
    if held_out:
        lines.append(
            f"{held_out} images of each context are held out, to try whether exogenous noise helps; if it does not,"
            " the adapter does without."
        )
    if captioned < LEAST_CAPTIONED:
        lines.append(
            f"{captioned} images to learn from have a caption. What captions say is learned from {LEAST_CAPTIONED} on;"
            " with fewer, samples are drawn without `match_prompt`."
        )
    return [*lines, *_measured(smallest)]


def _measured(smallest: int) -> list[str]:
    place = bisect_right([row.images for row in MEASURED], smallest)
    near = MEASURED[max(0, place - 1) : place + 1]
    figures = "; ".join(
        f"{row.images:,} images of each context, the AUROC of the graph was {row.auroc:.2f}, and the distance of"
        f" unseen pairs {row.pairs:.3f}"
        for row in near
    )
    few = "To learn from so few images is not solved. " if smallest < MEASURED[0].images else ""
    return [
        f"{few}On the synthetic images of quad, with a base that knew them: with {figures}. (AUROC: 0.5 is a guess, 1"
        " is best; distance: 0 is best.) Photographs may need more."
    ]
