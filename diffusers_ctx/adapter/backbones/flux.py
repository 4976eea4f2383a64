"""The transformer of FLUX.1, which takes latents as a sequence of patches of 2x2, and a position for each token.

Those of the text are all zero, and so are those of context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import nn

from ...autoencoding import pack_latents, unpack_latents
from .joint import JointTransformerBackbone
from .noising import FluxFlow


_PATCH_SIZE = 2  # the transformer's own `patch_size` counts what is packed already
# What models that are distilled from guidance are told: 1 is the flow of the images themselves, without guidance.
_GUIDANCE = 1.0


class FluxBackbone(JointTransformerBackbone):
    """A transformer of double blocks and single blocks, with T5 for the text and CLIP for its pooled embedding."""

    model_class = FluxTransformer2DModel
    lora_text_encoders = ("text_encoder",)
    noising = FluxFlow
    pipeline_name = "ComposableFluxPipeline"
    image_prompt = "encoder_hid_proj"
    t5, t5_limit = "text_encoder_2", 512

    @property
    def patch_size(self) -> int:
        return _PATCH_SIZE

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels // _PATCH_SIZE**2

    @property
    def sample_size(self) -> int:
        return 128  # the default of the pipeline, which the configuration does not say

    @property
    def first_weight(self) -> torch.Tensor:
        return self.model.x_embedder.weight

    def check_pipeline(self, pipeline: Any) -> None:
        if hasattr(pipeline, "text_encoder_3") or not hasattr(pipeline, "text_encoder_2"):
            raise ValueError("The checkpoint is of FLUX.1; train it with train_context_text_to_image_flux.py.")

    def requirements(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        names = ("in_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
        config = self.model.config
        return {
            "architecture": self.model_class.__name__,
            **{name: config[name] for name in (*names, "joint_attention_dim")},
        }

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor | float, conditions: dict[str, Any]) -> torch.Tensor:
        height, width = x.shape[2:]
        predicted = self.model(
            hidden_states=pack_latents(x),
            timestep=torch.as_tensor(timesteps, device=x.device).expand(len(x)) / 1000,
            img_ids=_image_positions(height // _PATCH_SIZE, width // _PATCH_SIZE, x.device),
            txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=x.device),
            guidance=torch.full([len(x)], _GUIDANCE, device=x.device) if self.model.config.guidance_embeds else None,
            **conditions,
            return_dict=False,
        )[0]
        return unpack_latents(predicted, height, width)

    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        text, pooled, _ = pipeline.encode_prompt(
            captions, device=pipeline._execution_device, max_sequence_length=self.t5_limit
        )
        return {"text": text, "pooled": pooled}

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def check_projections(self) -> None:
        if any(getattr(block.attn, "fused_projections", False) for block in self.blocks):
            self._refuse_fused()

    @classmethod
    def _longer_text(cls, kwargs: dict[str, Any], tokens: torch.Tensor) -> dict[str, Any]:
        positions = F.pad(kwargs["txt_ids"], (0, 0, 0, tokens.shape[1]))
        return super()._longer_text(kwargs, tokens) | {"txt_ids": positions}


def _image_positions(height: int, width: int, device: torch.device) -> torch.Tensor:
    """The position (height * width, 3) of each patch: zero, its row and its column."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
