"""Tiny real components that several tests share."""

import gc
import os
import runpy
import string
import sys
from collections.abc import Callable
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
# tiny tensors gain nothing from threads, and sums over other numbers of threads round otherwise
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusers_ctx import (
    ComposableFluxPipeline,
    ComposablePipeline,
    ComposableSD3Pipeline,
    ComposableXLPipeline,
    ContextModule,
    embedded_base,
)
from diffusers_ctx.adapter import attach_context_module, context_attention_layers


torch.set_num_threads(1)
gc.disable()  # until all is imported: nothing of that is garbage, and looking takes a fourth of the time

CONCEPTS = ["night", "snow", "fog"]

# the files that take longest, the longest first: one that starts last would keep its worker busy long after the others
LONG_FILES = [
    "training/test_training_script.py",
    "training/test_processes.py",
    "benchmarks/test_compare.py",
    "training/test_xl_training.py",
    "benchmarks/test_counterfactual_quad.py",
    "test_docs.py",
    "training/test_files.py",
    "benchmarks/test_quad_benchmark.py",
    "training/test_caption_fit.py",
    "test_tutorial.py",
    "ui/test_in_browser.py",
    "training/test_concept_stage.py",
    "pipelines/test_stock_behaviour.py",
    "adapter/test_saved_pipelines.py",
    "training/test_flow_search.py",
    "training/test_training_errors.py",
    "test_embedded.py",
    "training/test_compilation.py",
    "test_train_base.py",
    "test_examples.py",
    "training/test_ema.py",
    "training/test_stop_signals.py",
]

# what differs from the defaults of diffusers in the UNet of Stable Diffusion XL
SDXL_UNET = {
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
}


def make_components(cross_attention_dim: int = 32, prediction_type: str = "v_prediction") -> dict:
    """Random components of a Stable Diffusion for 32x32 images."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(embedded_base(), subfolder="tokenizer")
    return {
        "unet": make_unet(cross_attention_dim=cross_attention_dim),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=32,
        ).eval(),
        "text_encoder": CLIPTextModel(make_text_config(tokenizer, cross_attention_dim)).eval(),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            rescale_betas_zero_snr=prediction_type == "v_prediction",
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=False,
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }


def make_xl_components() -> dict:
    """Random components of a Stable Diffusion XL for 32x32 images."""
    components = make_components()
    del components["safety_checker"]
    tokenizer = components["tokenizer"]
    torch.manual_seed(0)
    return components | {
        "unet": make_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        ),
        "text_encoder": CLIPTextModel(make_text_config(tokenizer, 12, num_hidden_layers=2)).eval(),
        "text_encoder_2": make_clip_with_projection(tokenizer, 20),
        "tokenizer_2": tokenizer,
    }


def make_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A random encoder of captions, letter by letter."""
    letters = [(letter, -3.0) for letter in string.ascii_lowercase + string.digits]
    tokenizer = T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters],
        extra_ids=0,
        model_max_length=512,
    )
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(**sizes)).eval(), tokenizer


def make_centered_vae() -> AutoencoderKL:
    """A random autoencoder whose latents are centered, as those of Stable Diffusion 3 and FLUX.1 are."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()


def make_flux_components() -> dict:
    """Random components of a FLUX.1 that is distilled from guidance, for 32x32 images, in 64 patches."""
    tokenizer = CLIPTokenizer.from_pretrained(embedded_base(), subfolder="tokenizer")
    torch.manual_seed(0)
    text_encoder_2, tokenizer_2 = make_t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    return {
        "transformer": transformer.eval(),
        "vae": make_centered_vae(),
        "text_encoder": CLIPTextModel(make_text_config(tokenizer, 12)).eval(),
        "text_encoder_2": text_encoder_2,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def make_sd3_components() -> dict:
    """Random components of a Stable Diffusion 3 for 32x32 images, in 64 patches."""
    tokenizer = CLIPTokenizer.from_pretrained(embedded_base(), subfolder="tokenizer")
    torch.manual_seed(0)
    text_encoder_3, tokenizer_3 = make_t5()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return {
        "transformer": transformer.eval(),
        "vae": make_centered_vae(),
        "text_encoder": make_clip_with_projection(tokenizer, 12),
        "text_encoder_2": make_clip_with_projection(tokenizer, 20),
        "text_encoder_3": text_encoder_3,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer_3,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def make_clip_with_projection(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    config = make_text_config(tokenizer, width, num_hidden_layers=2, projection_dim=8)
    return CLIPTextModelWithProjection(config).eval()


def make_unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        **options,
    ).eval()


def make_text_config(tokenizer: CLIPTokenizer, width: int, **options) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 37,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | options
    )


def make_context_module(token_dim: int = 32, **options) -> ContextModule:
    """A context module of the tiny pipeline, with random weights all through."""
    torch.manual_seed(1)
    module = ContextModule(
        CONCEPTS, **{"token_dim": token_dim, "posterior_width": 8, "posterior_sample_size": 16} | options
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for weight in (module.mechanism.weight_obs, module.mechanism.weight_do):
        weight.data += torch.eye(weight.shape[-1])
    return module


def make_pipeline() -> ComposablePipeline:
    pipeline = ComposablePipeline(**make_components(), requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_xl_pipeline() -> ComposableXLPipeline:
    pipeline = ComposableXLPipeline(**make_xl_components(), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_sd3_pipeline() -> ComposableSD3Pipeline:
    pipeline = ComposableSD3Pipeline(**make_sd3_components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_flux_pipeline() -> ComposableFluxPipeline:
    pipeline = ComposableFluxPipeline(**make_flux_components())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def counterfactual_changes(pipeline, *contexts: list[str], **options) -> list[float]:
    """How far counterfactuals of an image under these interventions are from it, as latents; it arose under "snow"."""
    image = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))
    latents = pipeline._encode_images(pipeline._preprocess(image))
    options = {"prompt": "a picture of a circle", "output_type": "latent"} | options
    images = [pipeline.counterfactual(image, names, ["snow"], **options).images for names in contexts]
    return [((made - latents).norm() / latents.norm()).item() for made in images]


def attach_random_module(pipeline):
    """Attaches a context module with random attention values, where a fresh adapter's are zero."""
    attach_context_module(pipeline.unet, make_context_module())
    torch.manual_seed(2)
    for layer in context_attention_layers(pipeline.unet).values():
        torch.nn.init.normal_(layer["value"].weight, std=0.5)
    return pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first; `--no-loadscope-reorder` has pytest-xdist hand files out in this order."""
    order = {Path(__file__).parent / name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Collects garbage from here on, and does not look through what imports have made."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def run_program(monkeypatch, capsys) -> Callable[..., str]:
    """Runs a program in this process as `python program arguments` does; returns what it prints."""

    def run(program: Path, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(program), *map(str, arguments)])
        runpy.run_path(str(program), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def plain_pipeline() -> ComposablePipeline:
    return make_pipeline()


@pytest.fixture
def context_module() -> ContextModule:
    return make_context_module()
