"""The transformer of Stable Diffusion 3 and 3.5, whose text has neither positions nor a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

from .joint import JointTransformerBackbone
from .noising import RectifiedFlow


class SD3Backbone(JointTransformerBackbone):
    """A multimodal diffusion transformer with the three text encoders of Stable Diffusion 3, or without T5."""

    model_class = SD3Transformer2DModel
    noising = RectifiedFlow
    pipeline_name = "ComposableSD3Pipeline"
    image_prompt = "image_proj"
    t5, t5_limit = "text_encoder_3", 256

    @property
    def patch_size(self) -> int:
        return self.model.config.patch_size

    @property
    def first_weight(self) -> torch.Tensor:
        return self.model.pos_embed.proj.weight

    def check_pipeline(self, pipeline: Any) -> None:
        if not hasattr(pipeline, "text_encoder_3"):
            raise ValueError(
                "The checkpoint is of Stable Diffusion 3; train it with train_context_text_to_image_sd3.py."
            )

    def requirements(self, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
        names = ("in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
        config = self.model.config
        return {
            "architecture": self.model_class.__name__,
            **{name: config[name] for name in names},
            "dual_attention_layers": list(config.dual_attention_layers),
        }

    def predict(self, x: torch.Tensor, timesteps: torch.Tensor | float, conditions: dict[str, Any]) -> torch.Tensor:
        timestep = torch.as_tensor(timesteps, device=x.device).expand(len(x))
        return self.model(hidden_states=x, timestep=timestep, **conditions, return_dict=False)[0]

    def encode_captions(self, pipeline: Any, captions: list[str]) -> dict[str, torch.Tensor]:
        text, _, pooled, _ = pipeline.encode_prompt(
            captions,
            None,
            None,
            device=pipeline._execution_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.t5_limit,
        )
        return {"text": text, "pooled": pooled}

    def check_projections(self) -> None:
        if any(isinstance(part, FusedJointAttnProcessor2_0) for part in self.model.attn_processors.values()):
            self._refuse_fused()
