"""Weights of a context adapter on real bases, counted on the meta device: nothing is downloaded or computed.

    python benchmarks/adapter_sizes.py

Adapters have two concepts, and otherwise the defaults of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from diffusers_ctx import ContextModule
from diffusers_ctx.adapter import attach_context_module, backbone_of, context_attention_layers
from diffusers_ctx.adapter.image_features import BackboneFeatures
from diffusers_ctx.training.config import ContextConfig, ModelConfig
from diffusers_ctx.training.diffusion.trainable import prepare_mode


RESULTS = Path(__file__).parent / "results" / "adapter_sizes.json"
CONCEPTS = ["night", "snow"]
_SD_2 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
# without the table of positions at its full size, which is computed and no parameter
_SD_3 = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 64}
# what the configurations of UNets and transformers say besides the defaults of diffusers
BASES: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.x": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "Stable Diffusion 2.x": _SD_2 | {"sample_size": 96},
    "Stable Diffusion XL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "Stable Diffusion 3 medium": _SD_3,
    "Stable Diffusion 3.5 medium": _SD_3 | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "FLUX.1 dev": {"guidance_embeds": True},
}


def count_weights(options: dict[str, Any]) -> dict[str, int]:
    """Numbers of the UNet or transformer and of an adapter on it: `context_module`, `attention` and `lora`."""
    with init_empty_weights():
        model = _model_class(options)(**options)
        plain = _numbers(model)
        module = _create_module(model)
        attach_context_module(model, module)
        attention = _numbers(context_attention_layers(model))
        prepare_mode(model, "lora", ModelConfig("any").rank)
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return {
        backbone_of(model).component: plain,
        "context_module": _numbers(module),
        "attention": attention,
        "lora": lora,
    }


def _model_class(options: dict[str, Any]) -> type[ModelMixin]:
    if "guidance_embeds" in options:
        return FluxTransformer2DModel
    return SD3Transformer2DModel if "num_layers" in options else UNet2DConditionModel


def _create_module(model: ModelMixin) -> ContextModule:
    """The module that training makes for this model."""
    options, features, backbone = ContextConfig(), BackboneFeatures(model, [], lambda latents: {}), backbone_of(model)
    return ContextModule(
        CONCEPTS,
        token_dim=backbone.token_dim,
        num_hidden_factors=options.num_hidden_factors,
        noise_dim=options.noise_dim,
        concept_dim=options.noise_dim,
        tokens_per_concept=options.tokens_per_concept,
        posterior_in_channels=features.channels,
        posterior_sample_size=backbone.sample_size,
        posterior_encoder=backbone.component,
        posterior_feature_size=features.size(backbone.sample_size),
        caption_dim=backbone.token_dim,
    )


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    sizes = {"concepts": CONCEPTS} | {name: count_weights(options) for name, options in BASES.items()}
    RESULTS.write_text(json.dumps(sizes, indent=1) + "\n")


if __name__ == "__main__":
    main()
