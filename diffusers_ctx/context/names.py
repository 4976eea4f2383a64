"""Names of contexts and concepts."""

from __future__ import annotations

import unicodedata


def normal_name(name: str) -> str:
    """The name in Unicode's composed form (NFC), so that one name is one text.

    File systems and keyboards write `é` as one character or as two; both mean the same concept.
    """
    return unicodedata.normalize("NFC", name)
