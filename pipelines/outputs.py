"""What the pipelines return."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL.Image import Image


@dataclass
class ComposablePipelineOutput(BaseOutput):
    """Images and the exogenous noise that they were made from.

    With `return_dict=False`, every pipeline and `counterfactual` return the tuple `(images, exogenous_noise)`, in
    which the noise is `None` without a context adapter.

    Attributes:
        images: PIL images, an array (B, H, W, 3), a tensor (B, 3, H, W), or latents (B, C, h, w).
        exogenous_noise: (B, N, d_z), which `__call__` takes again to keep all that an intervention does not change;
            `None` without a context adapter.
        nsfw_content_detected: the safety checker's verdict on each image; `None` where there is no safety checker,
            as in Stable Diffusion XL, and for counterfactuals, which are not checked.
    """

    images: list[Image] | np.ndarray | torch.Tensor
    exogenous_noise: torch.Tensor | None = None
    nsfw_content_detected: list[bool] | None = None
