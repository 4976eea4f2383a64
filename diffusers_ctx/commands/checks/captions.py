"""Captions that give the context away."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from scipy.stats import fisher_exact

from .findings import Finding, Problem, percent
from .images import ImageTable


_WORD = re.compile(r"\w[\w'-]*")
_LEVEL = 0.01  # of all words together
_MORE_OFTEN = 0.3  # share of a context's captions, beyond that elsewhere
_SHOWN = 5


def find_telling_captions(table: ImageTable) -> list[Finding]:
    """Words that occur in the captions of one context far more often than elsewhere, and captions that only some
    contexts have.

    A word counts if its share of the context's captions is higher by 0.3 than that of all others, and Fisher's exact
    test finds it at 0.01, with Bonferroni's correction for the number of words and contexts.
    """
    has_caption = np.array([bool(caption.strip()) for caption in table.captions])
    if not has_caption.any():
        return []
    findings = _captioned_in_part(table, has_caption)
    words = [set(_WORD.findall(caption.casefold())) for caption in table.captions]
    captioned = np.flatnonzero(has_caption)
    contexts = sorted(set(table.contexts[captioned].tolist()))
    totals = Counter(word for row in captioned for word in words[row])
    tests = max(1, len(totals) * len(contexts))
    for context in contexts if len(contexts) > 1 else ():
        inside = [row for row in captioned if table.contexts[row] == context]
        counts = Counter(word for row in inside for word in words[row])
        telling = []
        for word, count in counts.items():
            others, outside = totals[word] - count, len(captioned) - len(inside)
            if count / len(inside) - others / outside < _MORE_OFTEN:
                continue
            square = [[count, len(inside) - count], [others, outside - others]]
            if fisher_exact(square, alternative="greater").pvalue * tests < _LEVEL:
                telling.append((word, count / len(inside), others / outside))
        if telling:
            findings.append(_of_words(context, sorted(telling, key=lambda row: row[2] - row[1])))
    return findings


def _of_words(context: str, telling: list[tuple[str, float, float]]) -> Finding:
    shown = ", ".join(
        f"{word!r} ({percent(inside)}, elsewhere {percent(out)})" for word, inside, out in telling[:_SHOWN]
    )
    more = f" and {len(telling) - _SHOWN} more words" if len(telling) > _SHOWN else ""
    return Problem(
        "captions",
        f"The captions of {context!r} give the context away: {shown}{more}. The prompt can then say what the"
        " intervention is to say; take these words out.",
        {"context": context, "words": [{"word": w, "share": i, "share_elsewhere": o} for w, i, o in telling]},
    )


def _captioned_in_part(table: ImageTable, has_caption: np.ndarray) -> list[Finding]:
    """Captions that a part of the images has, if contexts differ in that part."""
    shares = {context: float(has_caption[table.rows(context)].mean()) for context in table.names}
    if max(shares.values()) - min(shares.values()) < _MORE_OFTEN:
        return []
    shown = ", ".join(f"{context} {percent(share)}" for context, share in shares.items())
    return [
        Problem(
            "captions",
            f"Contexts differ in how many images have a caption ({shown}), so that having none gives the context"
            " away. Caption all of them, or none.",
            {"shares": shares},
        )
    ]
