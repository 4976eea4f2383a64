"""ComposableFluxPipeline: context tokens behind the text, packed latents, and a rectified flow that is inverted."""

import json

import numpy as np
import pytest
import torch
from conftest import counterfactual_changes, make_context_module, make_flux_pipeline, make_sd3_pipeline
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, FluxPipeline

from diffusers_ctx import ComposableFluxPipeline
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module, backbone_of
from diffusers_ctx.adapter.backbones.flux import FluxBackbone
from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.pipelines import Conditioner, describe_truncated
from diffusers_ctx.training.diffusion.trainable import prepare_mode


PROMPT = "a picture of a circle"
TRUE_CFG = {"true_cfg_scale": 3.0, "negative_prompt": "a square"}


def sample(pipeline, prompt=PROMPT, **arguments):
    """An image of 32x32: the plain pipeline cannot know the size."""
    defaults = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)}
    return pipeline(prompt, **(defaults | {"height": 32, "width": 32, "max_sequence_length": 32} | arguments))


@pytest.fixture
def pipeline() -> ComposableFluxPipeline:
    pipeline = make_flux_pipeline()
    attach_context_module(pipeline.transformer, make_context_module())
    return pipeline


@torch.no_grad()
def test_the_transformer_sees_a_longer_text(pipeline):
    transformer, module = pipeline.transformer, pipeline.context_module
    tokens = module(torch.randn(2, *module.noise_shape), torch.zeros(2, 3))
    x, text, pooled = torch.randn(2, 4, 4, 8), torch.randn(2, 5, 32), torch.randn(2, 12)
    backbone = backbone_of(transformer)
    conditions = backbone.conditions({"text": text, "pooled": pooled}, torch.zeros(2, 6))
    got = backbone.predict(x, 700.0, backbone.with_tokens(conditions, tokens))
    pipeline.unload_context_adapter()
    longer = torch.cat([text, tokens.flatten(1, 2)], dim=1)
    positions = FluxPipeline._prepare_latent_image_ids(2, 2, 4, "cpu", torch.float32)
    packed = FluxPipeline._pack_latents(x, 2, 4, 4, 8)
    zeros = torch.zeros(longer.shape[1], 3)
    expected = transformer(
        packed, longer, pooled, torch.full((2,), 0.7), positions, zeros, guidance=torch.ones(2)
    ).sample
    torch.testing.assert_close(got, FluxPipeline._unpack_latents(expected, 8, 16, 2))


@pytest.mark.parametrize("options", [{}, TRUE_CFG])
def test_interventions_act_and_scale_zero_and_unload_are_the_plain_pipeline(options):
    pipeline = make_flux_pipeline()
    stock = FluxPipeline(**pipeline.components)
    options = options | {"num_images_per_prompt": 2}
    plain = sample(stock, **options).images
    np.testing.assert_array_equal(sample(pipeline, **options).images, plain)
    attach_context_module(pipeline.transformer, make_context_module())
    outputs = [
        sample(pipeline, interventions=names, **options) for names in ([], ["snow"], {"snow": 0.5}, ["snow", "fog"])
    ]
    assert len({image.tobytes() for image in [plain, *(output.images for output in outputs)]}) == 5
    assert not np.array_equal(*outputs[0].exogenous_noise.numpy())  # each image has its own
    with pytest.raises(ValueError, match="use `ComposableFluxPipeline`, or call `unload_context_adapter"):
        sample(stock, **options)
    pipeline.set_context_scale(0)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"], **options).images, plain)
    pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(stock, **options).images, plain)


def test_each_prompt_has_its_interventions(pipeline):
    noise = torch.randn(2, *pipeline.context_module.noise_shape)
    latents = torch.randn(2, 64, 16)
    together = sample(
        pipeline, [PROMPT, "a square"], interventions=[["snow"], []], exogenous_noise=noise, latents=latents
    ).images
    alone = sample(pipeline, "a square", interventions=[], exogenous_noise=noise[1:], latents=latents[1:]).images
    np.testing.assert_allclose(together[1:], alone, atol=1e-5)


@pytest.mark.parametrize("options", [{}, TRUE_CFG])
def test_context_guidance_is_the_formula(pipeline, options):
    """A single step is linear in what the transformer predicts; the contrast is that at the prompt."""

    def one_step(names, scale=1.0, **options):
        step = {"num_inference_steps": 1, "output_type": "latent", "context_guidance_scale": scale}
        return sample(pipeline, interventions=names, **step, **options).images

    contrast = one_step(["snow"]) - one_step([])
    amplified = one_step(["snow"], scale=3.0, **options)
    torch.testing.assert_close(amplified, one_step(["snow"], **options) + 2 * contrast, atol=1e-5, rtol=1e-4)


def test_images_have_the_size_of_training_and_callbacks_work(pipeline):
    def callback(pipeline, step, timestep, tensors):
        return {name: 0.5 * tensor for name, tensor in tensors.items()}

    sized = {"height": None, "width": None, "num_inference_steps": 1}
    images = [
        sample(pipeline, **sized, **changes).images
        for changes in (
            {},
            {"latents": torch.randn(1, 64, 16)},
            {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
        )
    ]
    assert {image.shape for image in images} == {(1, 32, 32, 3)}
    assert len({image.tobytes() for image in images}) == 3
    with pytest.raises(ValueError, match="images for an IP-Adapter would take the same place"):
        sample(pipeline, negative_ip_adapter_image_embeds=[torch.zeros(1, 1, 32)])


def test_saved_and_loaded_it_is_the_same(pipeline, tmp_path):
    prepare_mode(pipeline.transformer, "lora", rank=2)
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = sample(pipeline, interventions=["snow", "fog"]).images
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    adapter = tmp_path / "pipeline" / "context_adapter"
    assert "import ComposableFluxPipeline" in (adapter / "README.md").read_text()

    loaded = ComposableFluxPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.concepts == ["night", "snow", "fog"] and LORA_ADAPTER in loaded.transformer.peft_config
    np.testing.assert_allclose(sample(loaded, interventions=["snow", "fog"]).images, expected, atol=1e-5)
    assert type(AutoPipelineForText2Image.from_pipe(loaded)) is ComposableFluxPipeline
    loaded.unload_context_adapter()
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(stock) is FluxPipeline
    np.testing.assert_array_equal(sample(loaded).images, sample(stock).images)
    adapted = ComposableFluxPipeline.from_pipe(stock)
    adapted.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        adapted.load_context_adapter(adapter)
    with pytest.raises(AdapterError, match="architecture is SD3Transformer2DModel, not FluxTransformer2DModel"):
        make_sd3_pipeline().load_context_adapter(adapter)
    assert json.loads((adapter / "context_adapter_config.json").read_text())["injection"] == "prompt"


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_counterfactual_of_what_happened_is_the_image_itself(pipeline, guidance_scale, monkeypatch):
    monkeypatch.setattr(FluxBackbone, "t5_limit", 16)  # pads would take most of the time
    options = {"num_inference_steps": 50, "guidance_scale": guidance_scale}
    change = counterfactual_changes(pipeline, ["snow"], ["fog"], **options)
    assert change[0] < 1e-4 and change[1] > 5 * change[0]


@torch.no_grad()
def test_features_are_those_of_the_middle_block(pipeline):
    transformer = pipeline.transformer
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    features = Conditioner.of(pipeline).backbone_features()
    got = features(latents, latents)
    assert got.shape == (1, features.channels, features.size(16), features.size(16)) == (1, 16, 8, 8)
    pipeline.unload_context_adapter()
    text, pooled, zeros = pipeline.encode_prompt("")
    made = []
    transformer.single_transformer_blocks[0].register_forward_hook(lambda *given: made.append(given[-1][1]))
    positions = FluxPipeline._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    packed = FluxPipeline._pack_latents(latents, 1, 4, 16, 16)
    transformer(packed, text, pooled, torch.zeros(1), positions, zeros, guidance=torch.ones(1))
    torch.testing.assert_close(got, made[0].transpose(1, 2).reshape(1, 16, 8, 8))


def test_captions_are_as_long_as_t5_takes(pipeline):
    assert describe_truncated(pipeline, ["a b " * 120]) is None  # which CLIP cuts off
    assert "longer than the 512 tokens" in describe_truncated(pipeline, ["a b " * 300])
