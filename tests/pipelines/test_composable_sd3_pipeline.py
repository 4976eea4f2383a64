"""ComposableSD3Pipeline: context tokens behind the text of a transformer, and a rectified flow that is inverted."""

import json

import numpy as np
import pytest
import torch
from conftest import counterfactual_changes, make_context_module, make_pipeline, make_sd3_components, make_sd3_pipeline
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from PIL import Image

from diffusers_ctx import ComposableSD3Pipeline
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module
from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.pipelines import Conditioner, describe_truncated
from diffusers_ctx.training.diffusion.trainable import prepare_mode


PROMPT = "a picture of a circle"


def sample(pipeline, prompt=PROMPT, **arguments):
    defaults = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)}
    return pipeline(prompt, **(defaults | arguments))


@pytest.fixture
def pipeline() -> ComposableSD3Pipeline:
    pipeline = make_sd3_pipeline()
    attach_context_module(pipeline.transformer, make_context_module())
    return pipeline


@torch.no_grad()
def test_the_transformer_sees_a_longer_text(pipeline):
    transformer, module = pipeline.transformer, pipeline.context_module
    x, text, pooled = torch.randn(4, 4, 16, 16), torch.randn(4, 5, 32), torch.randn(4, 16)
    tokens = module(torch.randn(2, *module.noise_shape), torch.zeros(2, 3))
    timestep = torch.full((4,), 700.0)
    own = {"ip_adapter_image_embeds": [tokens]}
    longer = torch.cat([text, torch.cat([tokens.flatten(1, 2)] * 2)], dim=1)
    got = transformer(x, text, pooled, timestep, joint_attention_kwargs=own).sample
    assert list(own) == ["ip_adapter_image_embeds"]
    (without_middle,) = transformer(x, text, pooled, timestep, None, own, False, [1])
    with pytest.raises(TypeError):
        transformer(x, text, pooled, timestep, None, own, False, [1], "one too many")
    pipeline.unload_context_adapter()
    torch.testing.assert_close(got, transformer(x, longer, pooled, timestep).sample)
    torch.testing.assert_close(without_middle, transformer(x, longer, pooled, timestep, skip_layers=[1]).sample)
    assert not torch.equal(without_middle, got)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_interventions_act_and_scale_zero_and_unload_are_the_plain_pipeline(guidance_scale):
    pipeline = make_sd3_pipeline()
    stock = StableDiffusion3Pipeline(**pipeline.components)
    options = {"guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    plain = sample(stock, **options).images
    np.testing.assert_array_equal(sample(pipeline, **options).images, plain)
    with pytest.raises(ValueError, match="load_context_adapter"):
        sample(pipeline, interventions=["snow"])
    attach_context_module(pipeline.transformer, make_context_module())
    outputs = [
        sample(pipeline, interventions=names, **options) for names in ([], ["snow"], {"snow": 0.5}, ["snow", "fog"])
    ]
    assert len({image.tobytes() for image in [plain, *(output.images for output in outputs)]}) == 5
    assert all(torch.equal(output.exogenous_noise, outputs[0].exogenous_noise) for output in outputs)
    with pytest.raises(ValueError, match="use `ComposableSD3Pipeline`, or call `unload_context_adapter"):
        sample(stock, **options)
    pipeline.set_context_scale(0)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"], **options).images, plain)
    pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(stock, **options).images, plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_context_guidance_is_the_formula(pipeline, guidance_scale):
    """A single step is linear in what the transformer predicts; the contrast is that at the prompt."""

    def one_step(names, guidance, scale=1.0):
        options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": guidance}
        return sample(pipeline, interventions=names, context_guidance_scale=scale, **options).images

    contrast = one_step(["snow"], guidance=1.0) - one_step([], guidance=1.0)
    amplified = one_step(["snow"], guidance_scale, scale=3.0)
    torch.testing.assert_close(amplified, one_step(["snow"], guidance_scale) + 2 * contrast, atol=1e-5, rtol=1e-4)


def test_guidance_may_end_and_layers_be_skipped(pipeline):
    attention = {"scale": 1.0}
    options = {"num_inference_steps": 4, "interventions": ["snow"], "joint_attention_kwargs": attention}
    cutoff = SD3CFGCutoffCallback(cutoff_step_ratio=0.5)
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.9}
    images = [
        sample(pipeline, **options | changes).images
        for changes in ({}, {"callback_on_step_end": cutoff}, skipping, skipping | {"context_guidance_scale": 2.0})
    ]
    assert len({image.tobytes() for image in images}) == 4
    assert attention == {"scale": 1.0}


def test_noise_matches_the_prompt_and_images_have_the_size_of_training():
    pipeline = make_sd3_pipeline()
    attach_context_module(pipeline.transformer, make_context_module(caption_dim=32, posterior_sample_size=12))
    outputs = [sample(pipeline, match_prompt=choice, num_inference_steps=1) for choice in (None, True, False)]
    assert torch.equal(outputs[0].exogenous_noise, outputs[1].exogenous_noise)
    assert not torch.equal(outputs[0].exogenous_noise, outputs[2].exogenous_noise)
    assert outputs[0].images.shape == (1, 24, 24, 3)


def test_saved_and_loaded_it_is_the_same(pipeline, tmp_path):
    prepare_mode(pipeline.transformer, "lora", rank=2)
    for name, weight in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = sample(pipeline, interventions=["snow", "fog"]).images
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow", "fog"]).images, expected)
    adapter = tmp_path / "pipeline" / "context_adapter"
    config = json.loads((adapter / "context_adapter_config.json").read_text())
    assert (config["injection"], config["mode"]) == ("prompt", "lora")
    assert "import ComposableSD3Pipeline" in (adapter / "README.md").read_text()

    loaded = ComposableSD3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.concepts == ["night", "snow", "fog"] and LORA_ADAPTER in loaded.transformer.peft_config
    np.testing.assert_allclose(sample(loaded, interventions=["snow", "fog"]).images, expected, atol=1e-5)
    loaded.unload_context_adapter()
    stock = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(stock) is StableDiffusion3Pipeline
    np.testing.assert_array_equal(sample(loaded).images, sample(stock).images)
    with pytest.raises(AdapterError, match=r"architecture is UNet2DConditionModel, not SD3Transformer2DModel"):
        make_pipeline().load_context_adapter(adapter)


def test_an_adapter_of_a_unet_is_refused(tmp_path):
    origin = make_pipeline()
    attach_context_module(origin.unet, make_context_module())
    origin.save_context_adapter(tmp_path)
    with pytest.raises(AdapterError, match="does not fit the loaded base model"):
        make_sd3_pipeline().load_context_adapter(tmp_path)
    with pytest.raises(ValueError, match="cannot enter a transformer by 'cross_attention'; choose"):
        attach_context_module(make_sd3_pipeline().transformer, make_context_module(), "cross_attention")


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_counterfactual_of_what_happened_is_the_image_itself(pipeline, guidance_scale):
    options = {"num_inference_steps": 20, "guidance_scale": guidance_scale}
    change = counterfactual_changes(pipeline, ["snow"], ["fog"], **options)
    assert change[0] < 1e-4 and change[1] > 5 * change[0]


@torch.no_grad()
def test_latents_are_those_of_the_pipeline(pipeline):
    """The autoencoder's latents are centred, which the plain pipeline undoes before it decodes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    latents = pipeline._encode_images(pipeline._preprocess(image))
    pixels = pipeline.image_processor.preprocess(image)
    torch.testing.assert_close(latents / 1.5305 + 0.0609, pipeline.vae.encode(pixels).latent_dist.mean)


@torch.no_grad()
def test_features_are_those_of_the_middle_block(pipeline):
    transformer = pipeline.transformer
    latents = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0))
    features = Conditioner.of(pipeline).backbone_features()
    got = features(latents, latents)
    assert pipeline.context_module is not None
    assert got.shape == (2, features.channels, features.size(16), features.size(16)) == (2, 16, 8, 8)
    text, _, pooled, _ = pipeline.encode_prompt([""] * 2, None, None, do_classifier_free_guidance=False)
    hidden, text = transformer.pos_embed(latents), transformer.context_embedder(text)
    told = transformer.time_text_embed(torch.zeros(2), pooled)
    for block in transformer.transformer_blocks[:2]:
        text, hidden = block(hidden, text, told)
    torch.testing.assert_close(got, hidden.transpose(1, 2).reshape(2, 16, 8, 8))


def test_without_t5_and_as_one_of_diffusers_auto_classes(pipeline):
    components = make_sd3_components() | {"text_encoder_3": None, "tokenizer_3": None}
    smaller = ComposableSD3Pipeline(**components)
    attach_context_module(smaller.transformer, make_context_module())
    assert sample(smaller, interventions=["snow"], num_inference_steps=1).images.shape == (1, 32, 32, 3)
    assert type(AutoPipelineForText2Image.from_pipe(smaller)) is ComposableSD3Pipeline


def test_captions_are_as_long_as_t5_takes(pipeline):
    assert describe_truncated(pipeline, ["a b " * 60]) is None  # which CLIP cuts off
    line = describe_truncated(pipeline, ["a b " * 60, "a b " * 120])
    assert line == "1 of 2 captions are longer than the 256 tokens that the text encoder takes; the rest is cut off."


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match=r"not for Linear; .* UNet2DConditionModel or SD3Transformer2DModel or "):
        attach_context_module(torch.nn.Linear(2, 2), make_context_module())
