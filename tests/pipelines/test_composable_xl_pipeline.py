"""ComposableXLPipeline is to StableDiffusionXLPipeline what ComposablePipeline is to StableDiffusionPipeline."""

import json

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_context_module, make_pipeline, make_xl_pipeline
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

from diffusers_ctx import ComposableXLPipeline
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.pipelines import Conditioner


PROMPT = "a picture of a circle"


def sample(pipeline, prompt=PROMPT, **arguments):
    defaults = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)}
    return pipeline(prompt, **(defaults | arguments))


@pytest.fixture
def pipeline() -> ComposableXLPipeline:
    return attach_random_module(make_xl_pipeline())


@pytest.fixture
def image(pipeline) -> np.ndarray:
    return sample(pipeline, interventions=["snow"], guidance_scale=1.0).images


def test_without_an_adapter_it_is_the_plain_pipeline():
    pipeline = make_xl_pipeline()
    stock = StableDiffusionXLPipeline(**pipeline.components, add_watermarker=False)
    np.testing.assert_array_equal(sample(pipeline).images, sample(stock).images)
    with pytest.raises(ValueError, match="load_context_adapter"):
        sample(pipeline, interventions=["snow"])


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_interventions_change_images_and_compose(pipeline, guidance_scale):
    outputs = [
        sample(pipeline, guidance_scale=guidance_scale, interventions=names, num_images_per_prompt=2)
        for names in ([], ["snow"], ["fog"], ["snow", "fog"])
    ]
    assert all(output.images.shape == (2, 32, 32, 3) for output in outputs)
    assert all(torch.equal(output.exogenous_noise, outputs[0].exogenous_noise) for output in outputs)
    for one in range(4):
        for other in range(one):
            assert np.abs(outputs[one].images - outputs[other].images).max() > 1e-3


def test_images_have_the_size_that_the_adapter_was_trained_on():
    pipeline = make_xl_pipeline()
    attach_context_module(pipeline.unet, make_context_module(posterior_sample_size=12))
    images = sample(pipeline).images
    assert images.shape == (1, 24, 24, 3)
    told = {"height": 24, "width": 24, "original_size": (24, 24), "target_size": (24, 24)}
    np.testing.assert_array_equal(images, sample(pipeline, **told).images)
    latents = torch.randn(1, 4, 12, 12, generator=torch.manual_seed(0))
    np.testing.assert_array_equal(images, sample(pipeline, latents=latents).images)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_context_guidance_is_the_formula(pipeline, guidance_scale):
    """A single step is linear in what the UNet predicts; the contrast is that at the prompt."""

    def one_step(names, guidance, scale=1.0):
        options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": guidance}
        return sample(pipeline, interventions=names, context_guidance_scale=scale, **options).images

    contrast = one_step(["snow"], guidance=1.0) - one_step([], guidance=1.0)
    weakened = one_step(["snow"], guidance_scale, scale=0.4)
    torch.testing.assert_close(weakened, one_step(["snow"], guidance_scale) - 0.6 * contrast, atol=1e-5, rtol=1e-4)


def test_noise_matches_the_prompt_by_default():
    pipeline = make_xl_pipeline()
    attach_context_module(pipeline.unet, make_context_module(caption_dim=32))
    noise = [
        sample(pipeline, match_prompt=choice, num_inference_steps=1).exogenous_noise for choice in (None, True, False)
    ]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_a_guided_counterfactual_of_what_happened_is_the_image_itself(pipeline, image):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    latents = pipeline._encode_images(pipeline._preprocess(image))
    options = {"prompt": PROMPT, "guidance_scale": 4.0, "num_inference_steps": 20, "output_type": "latent"}
    change = [
        (pipeline.counterfactual(image, names, ["snow"], **options).images - latents).norm() / latents.norm()
        for names in (["snow"], ["fog"])
    ]
    assert change[0] < 0.01 and change[1] > 5 * change[0]


def test_other_arguments_reach_the_plain_pipeline(pipeline):
    plain = sample(pipeline)
    for arguments in ({"prompt_2": "a square"}, {"original_size": (8, 8)}, {"negative_prompt": "a square"}):
        assert np.abs(sample(pipeline, **arguments).images - plain.images).max() > 1e-5
    with pytest.raises(TypeError):
        pipeline(PROMPT, prompt=PROMPT)


def test_saved_and_loaded_it_is_the_same(pipeline, tmp_path):
    expected = sample(pipeline, interventions=["snow"]).images
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionXLPipeline"
    )
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipeline")) is StableDiffusionXLPipeline
    pipeline.save_context_adapter(tmp_path / "adapter")
    assert "import ComposableXLPipeline" in (tmp_path / "adapter" / "README.md").read_text()
    loaded = ComposableXLPipeline.from_pretrained(tmp_path / "pipeline", add_watermarker=False)
    loaded.load_context_adapter(tmp_path / "adapter")
    np.testing.assert_allclose(sample(loaded, interventions=["snow"]).images, expected, atol=1e-5)
    loaded.unload_context_adapter()
    np.testing.assert_allclose(sample(loaded).images, sample(make_xl_pipeline()).images, atol=1e-5)


def test_an_adapter_of_the_other_kind_is_refused(pipeline, tmp_path):
    pipeline.save_context_adapter(tmp_path)
    with pytest.raises(AdapterError, match="addition_embed_type"):
        make_pipeline().load_context_adapter(tmp_path)


def test_a_counterfactual_of_what_happened_is_the_image_itself(pipeline, image):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    latents = pipeline._encode_images(pipeline._preprocess(image))

    def change(interventions):
        output = pipeline.counterfactual(
            image, interventions, ["snow"], prompt=PROMPT, num_inference_steps=20, output_type="latent"
        )
        return ((output.images - latents).norm() / latents.norm()).item()

    assert change(["snow"]) < 0.01
    assert change(["fog"]) > 5 * change(["snow"])


def test_no_prompt_is_told_as_guidance_tells_it(pipeline):
    geometry = torch.tensor([[40, 36, 1, 2, 32, 32], [32, 32, 0, 0, 32, 32]])
    conditioner = Conditioner.of(pipeline)
    conditions = conditioner.model_kwargs(conditioner.encode_captions(["", PROMPT]), geometry)
    added = conditions["added_cond_kwargs"]
    text, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPT)
    torch.testing.assert_close(conditions["encoder_hidden_states"], torch.cat([negative, text]))
    torch.testing.assert_close(added["text_embeds"], torch.cat([negative_pooled, pooled]))
    assert torch.equal(added["time_ids"], geometry.float())


def test_an_autoencoder_that_overflows_encodes_in_single_precision(pipeline, image):
    expected = pipeline._encode_images(pipeline._preprocess(image))
    pipeline.vae.half()
    assert pipeline.vae.config.force_upcast
    encoded = pipeline._encode_images(pipeline._preprocess(image))
    assert encoded.dtype == pipeline.vae.dtype == torch.float16
    torch.testing.assert_close(encoded.float(), expected, atol=1e-2, rtol=1e-2)
