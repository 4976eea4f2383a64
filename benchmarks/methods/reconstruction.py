"""The upper bound of every method: real images through the base's autoencoder, which decodes all samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.features import autoencode

from .quad_setting import QuadSetting
from .setting import BATCH_SIZE, Sampler, device


@dataclass(frozen=True)
class Reconstruction:
    """Held-out images of the very interventions, encoded and decoded; nothing learns."""

    def steps(self, setting: QuadSetting) -> int:
        return 0

    def train(self, setting: QuadSetting, folder: Path) -> None:
        """There is nothing to train."""

    def load(self, setting: QuadSetting, folder: Path) -> Sampler:
        vae = AutoencoderKL.from_pretrained(setting.base, subfolder="vae", torch_dtype=torch.float32).to(device())

        def sample(captions: Sequence[str], interventions: Sequence[str], seed: int) -> np.ndarray:
            real = quad.generate(interventions, len(captions), quad.FIRST_HELD_OUT_SEED + seed, setting.dependent)
            starts = range(0, len(captions), BATCH_SIZE)
            return np.concatenate([autoencode(vae, real.images[start : start + BATCH_SIZE]) for start in starts])

        return sample
