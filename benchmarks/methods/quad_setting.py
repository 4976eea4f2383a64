"""quad as the published results have it: its own training images, and their exogenous noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from beds.bed import Bed
from beds.quad_variants import QuadBed

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad

from .setting import Setting


@dataclass(frozen=True, kw_only=True)
class QuadSetting(Setting):
    """A comparison on quad.

    Attributes:
        dependent: quad's variant.
    """

    dependent: bool
    bed: Bed = field(default_factory=QuadBed)
    base: str = field(default_factory=embedded_base)

    @property
    def name(self) -> str:
        return f"{'dependent' if self.dependent else 'independent'}-seed{self.seed}-images{self.images_per_context}"

    def write_images(self, folder: Path) -> None:
        quad.write_folders(folder, self.images_per_context, self.seed, self.dependent)

    def true_noise(self, contexts: Sequence[str]) -> torch.Tensor:
        """The simulator's exogenous noise (n, 8) of the training images, in the order of their context names."""
        drawn = {
            name: iter(np.random.default_rng(self.seed + offset).standard_normal((self.images_per_context, 8)))
            for offset, name in enumerate(quad.contexts())
        }
        return torch.tensor(np.array([next(drawn[name]) for name in contexts]), dtype=torch.float32)
