"""Context tokens behind those of the text: the second way of attaching, without attention processors."""

import json

import numpy as np
import pytest
import torch
from conftest import make_context_module, make_pipeline, make_xl_pipeline
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusers_ctx.adapter import attach_context_module, backbone_of


PROMPT = "a picture of a circle"


@pytest.fixture(params=[make_pipeline, make_xl_pipeline], ids=["sd", "sdxl"])
def make(request):
    return request.param


def sample(pipeline, **arguments) -> np.ndarray:
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.manual_seed(0)}
    return pipeline(PROMPT, **options | arguments).images


@torch.no_grad()
def test_the_unet_sees_a_longer_text():
    pipeline = make_pipeline()
    unet, module = pipeline.unet, make_context_module()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    tokens = module(torch.randn(2, *module.noise_shape), torch.zeros(2, 3))
    expected = unet(x, 10, torch.cat([text, tokens.flatten(1, 2)], dim=1)).sample
    attach_context_module(unet, module, "prompt")
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
    conditions = backbone_of(unet).with_tokens({"encoder_hidden_states": text}, tokens)
    torch.testing.assert_close(unet(x, 10, **conditions).sample, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_interventions_act_and_scale_zero_and_unload_are_the_plain_pipeline(make, guidance_scale):
    pipeline = make()
    plain = sample(pipeline, guidance_scale=guidance_scale)
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    assert pipeline.concepts == ["night", "snow", "fog"]
    images = [
        sample(pipeline, interventions=names, guidance_scale=guidance_scale)
        for names in ([], ["snow"], {"snow": 0.5}, ["snow", "fog"])
    ]
    assert len({image.tobytes() for image in [plain, *images]}) == 5
    guided = sample(pipeline, interventions=["snow"], guidance_scale=guidance_scale, context_guidance_scale=2.0)
    assert np.abs(guided - images[1]).max() > 0
    pipeline.set_context_scale(0)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"], guidance_scale=guidance_scale), plain)
    pipeline.set_context_scale(1)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"], guidance_scale=guidance_scale), images[1])
    with pytest.raises(ValueError, match=r"the scale can be 0 or 1, not 0\.5"):
        pipeline.set_context_scale(0.5)
    pipeline.unload_context_adapter()
    np.testing.assert_array_equal(sample(pipeline, guidance_scale=guidance_scale), plain)


def test_it_is_saved_and_loaded(make, tmp_path):
    pipeline, fresh = make(), make()
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    folder = pipeline.save_context_adapter(tmp_path / "adapter")
    assert json.loads((folder / "context_adapter_config.json").read_text())["injection"] == "prompt"
    fresh.load_context_adapter(folder)
    expected = sample(pipeline, interventions=["snow", "fog"])
    np.testing.assert_array_equal(sample(fresh, interventions=["snow", "fog"]), expected)


def test_the_pipeline_is_saved_without_it(tmp_path):
    pipeline = make_pipeline()
    plain = sample(pipeline)
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    expected = sample(pipeline, interventions=["snow"])
    pipeline.save_pretrained(tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    np.testing.assert_array_equal(sample(stock), plain)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]), expected)


def test_counterfactuals_of_no_change_give_the_image_back(make):
    pipeline = make()
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    image = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))
    options = {"factual_interventions": ["snow"], "prompt": PROMPT, "num_inference_steps": 20, "output_type": "latent"}
    latents = pipeline._encode_images(pipeline._preprocess(image))
    change = [
        (pipeline.counterfactual(image, names, **options).images - latents).norm() / latents.norm()
        for names in (["snow"], ["fog"])
    ]
    assert change[0] < 0.01 and change[1] > 2 * change[0]


def test_an_unknown_injection():
    with pytest.raises(ValueError, match="Unknown injection 'text'; choose one of"):
        attach_context_module(make_pipeline().unet, make_context_module(), "text")
