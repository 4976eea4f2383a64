"""Every test bed, by name."""

from __future__ import annotations

from pathlib import Path

from beds.bed import Bed
from beds.designs import Designs
from beds.digits import Digits
from beds.ink import Ink
from beds.photographs import PhotographsBed
from beds.quad_variants import VARIANTS, QuadBed
from beds.scenes import Scenes


BEDS = (
    "designs",
    "designs-random-tone",
    "digits",
    "ink",
    "photographs",
    "scenes",
    *(f"quad-{variant}" for variant in VARIANTS),
)


def create_bed(name: str, cache_dir: str | Path) -> Bed:
    """The bed of this name; what it is made from is fetched to `cache_dir` if it is not there."""
    if name.startswith("designs"):
        return Designs(cache_dir, random_tone=name == "designs-random-tone")
    if name == "digits":
        return Digits(cache_dir=cache_dir)
    if name == "ink":
        return Ink(cache_dir=cache_dir)
    if name == "photographs":
        return PhotographsBed(cache_dir)
    if name == "scenes":
        return Scenes()
    return QuadBed(name.removeprefix("quad-"))
