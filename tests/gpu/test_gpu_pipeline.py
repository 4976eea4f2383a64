"""Sampling and counterfactuals on a GPU, held against the CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline, make_xl_pipeline
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from diffusers_ctx import ComposablePipeline, ContextModule, embedded_adapter, embedded_base
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module


PROMPT = "a picture of a circle"


@pytest.fixture
def expected() -> dict:
    """What the CPU makes of it, without and with an intervention, and the counterfactual of an image."""
    return everything(attach_random_module(make_pipeline()))


@pytest.fixture
def pipeline() -> ComposablePipeline:
    return attach_random_module(make_pipeline()).to("cuda")  # random numbers of a GPU are others


def images(pipeline, interventions=("snow",), **arguments) -> np.ndarray:
    return sample(pipeline, interventions=list(interventions), **arguments).images


def sample(pipeline, seed=0, device="cpu", **arguments):
    defaults = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    generator = torch.Generator(device).manual_seed(seed)
    return pipeline(PROMPT, **(defaults | {"generator": generator} | arguments))


def photo() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def everything(pipeline, **arguments) -> dict[str, np.ndarray]:
    counterfactual = pipeline.counterfactual(photo(), ["snow"], ["fog"], num_inference_steps=3, output_type="np")
    return {
        "plain": images(pipeline, [], **arguments),
        "snow": images(pipeline, **arguments),
        "soft": sample(pipeline, interventions={"snow": 0.5, "night": 1.0}, **arguments).images,
        "guided": images(pipeline, context_guidance_scale=1.5, **arguments),
        "noise": pipeline.infer_exogenous_noise(photo(), ["fog"]).float().cpu().numpy(),
        "counterfactual": counterfactual.images,
    }


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float) -> None:
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], atol=atol, err_msg=name)


# as on the CPU


def test_a_seed_gives_what_it_gives_on_the_cpu(pipeline, expected):
    assert pipeline.context_module.device.type == "cuda"
    assert_close(everything(pipeline), expected, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(pipeline, expected, dtype):
    size = pipeline.unet.config.sample_size
    # of its own, a pipeline draws it in half precision, for which some versions of PyTorch draw other numbers
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))
    got = everything(pipeline.to(dtype), latents=noise.to(dtype))
    for name in expected:
        assert got[name].shape == expected[name].shape and np.isfinite(got[name]).all()
        assert np.abs(got[name] - expected[name]).mean() < 0.03, name


def test_stable_diffusion_xl_samples_as_on_the_cpu():
    expected = everything(attach_random_module(make_xl_pipeline()))
    got = everything(attach_random_module(make_xl_pipeline()).to("cuda"))
    assert_close(got, expected, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stable_diffusion_xl_samples_in_half_precision(dtype):
    got = everything(attach_random_module(make_xl_pipeline().to("cuda", dtype)))
    assert all(np.isfinite(value).all() for value in got.values())
    assert np.abs(got["snow"] - got["plain"]).max() > 1e-3


def test_the_shipped_adapter_draws_what_it_draws_on_the_cpu():
    got = []
    for device in ("cpu", "cuda"):
        pipeline = ComposablePipeline.from_pretrained(embedded_base(), safety_checker=None).to(device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_context_adapter(embedded_adapter("quad"))
        got.append(images(pipeline, ["quad1", "quad4"], num_inference_steps=3))
    np.testing.assert_allclose(*got, atol=0.02)


def test_an_adapter_is_saved_from_the_gpu_and_loaded_there(pipeline, tmp_path):
    add_context_lora(pipeline)
    before = everything(pipeline)
    pipeline.save_context_adapter(tmp_path)
    for loaded in (make_pipeline().to("cuda"), make_pipeline()):
        loaded.load_context_adapter(tmp_path)
        assert_close(everything(loaded.to("cuda")), before, atol=1e-3)


def test_strengths_lead_from_observational_to_intervened(pipeline):
    made = [sample(pipeline, interventions={"snow": strength}).images for strength in (0.0, 0.5, 1.0)]
    np.testing.assert_allclose(made[0], images(pipeline, []), atol=1e-4)
    np.testing.assert_allclose(made[2], images(pipeline), atol=1e-4)
    assert np.abs(made[1] - made[0]).max() > 1e-4


def test_a_counterfactual_without_change_gives_the_image_back(pipeline):
    pipeline.unet.conv_out.weight.data *= 0.05  # as smooth as a trained model: inversion needs that
    for context in ([], ["snow"]):
        arguments = {"factual_interventions": context, "num_inference_steps": 20, "output_type": "latent"}
        back = pipeline.counterfactual(photo(), context, **arguments).images
        latents = pipeline._encode_images(pipeline._preprocess(photo()))
        torch.testing.assert_close(back, latents, atol=1e-2, rtol=1e-2)


# noise, wherever it is


def test_generators_of_the_gpu_are_taken_and_not_advanced_for_the_concepts(pipeline):
    first, again = (sample(pipeline, device="cuda", interventions=names) for names in (["snow"], []))
    assert torch.equal(first.exogenous_noise, again.exogenous_noise)
    assert not torch.equal(first.exogenous_noise, sample(pipeline, seed=1, device="cuda").exogenous_noise)
    used, untouched = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    pipeline._prepare_exogenous_noise(2, used)
    numbers = [torch.randn(3, generator=generator, device="cuda") for generator in (used, untouched)]
    assert torch.equal(*numbers)
    stock = StableDiffusionPipeline(**make_pipeline().components, requires_safety_checker=False).to("cuda")
    stock.set_progress_bar_config(disable=True)
    pipeline.set_context_scale(0.0)
    np.testing.assert_allclose(images(pipeline, [], device="cuda"), sample(stock, device="cuda").images, atol=1e-4)


def test_every_image_may_have_a_generator_of_the_gpu(pipeline):
    generators = [torch.Generator("cuda").manual_seed(seed) for seed in range(2)]
    output = pipeline([PROMPT] * 2, interventions=[["night"], {"fog": 0.5}], generator=generators, output_type="np")
    assert output.images.shape[0] == 2 and not torch.equal(*output.exogenous_noise)


def test_exogenous_noise_may_come_from_either_device(pipeline):
    first = sample(pipeline, interventions=["snow"])
    for device in ("cpu", "cuda"):
        again = images(pipeline, exogenous_noise=first.exogenous_noise.to(device))
        np.testing.assert_allclose(again, first.images, atol=1e-5)
    explained = images(pipeline, exogenous_noise=pipeline.infer_exogenous_noise(photo()))
    assert np.isfinite(explained).all()


# weights that are put away


def add_context_lora(pipeline) -> None:
    """As mode lora has it."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    pipeline.unet.add_adapter(config, LORA_ADAPTER)


def test_offloaded_models_give_the_same(expected):
    pipeline = attach_random_module(make_pipeline())
    pipeline.enable_model_cpu_offload()
    for _ in range(2):
        assert_close(everything(pipeline), expected, atol=5e-3)
    assert pipeline.unet.device.type == "cpu"


def test_offloaded_models_keep_what_features_are_made_without():
    """The posterior reads features of the base model: context module and LoRAs are off it while it goes to the GPU."""
    module = ContextModule(
        ["night", "snow", "fog"],
        token_dim=32,
        posterior_encoder="unet",
        posterior_in_channels=16,
        posterior_sample_size=16,
        posterior_feature_size=8,
    )
    pipeline = make_pipeline()
    attach_context_module(pipeline.unet, module)
    add_context_lora(pipeline)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    pipeline.text_encoder.add_adapter(config, LORA_ADAPTER)
    expected = everything(pipeline)
    pipeline.enable_model_cpu_offload()
    for _ in range(2):
        assert_close(everything(pipeline), expected, atol=5e-3)


def test_layers_that_are_offloaded_one_by_one_give_the_same(expected):
    plain = make_pipeline()
    plain.enable_sequential_cpu_offload()
    try:
        sample(plain)
    except Exception as error:
        pytest.skip(f"the plain pipeline does not work with it either: {error}")
    pipeline = attach_random_module(make_pipeline())
    pipeline.enable_sequential_cpu_offload()
    assert_close(everything(pipeline), expected, atol=5e-3)


def test_groups_of_layers_that_are_offloaded_give_the_same(expected):
    pipeline = attach_random_module(make_pipeline())
    pipeline.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")
    assert_close(everything(pipeline), expected, atol=5e-3)


# other ways to compute


def test_xformers_gives_the_same(pipeline, expected):
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    pipeline.enable_xformers_memory_efficient_attention()
    assert_close(everything(pipeline), expected, atol=5e-3)
    pipeline.disable_xformers_memory_efficient_attention()
    assert_close(everything(pipeline), expected, atol=5e-3)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_unet_gives_the_same(pipeline, expected, tmp_path: Path, in_place):
    if in_place:
        pipeline.unet.compile()
    else:
        pipeline.unet = torch.compile(pipeline.unet)
    np.testing.assert_allclose(images(pipeline), expected["snow"], atol=5e-3)
    np.testing.assert_allclose(images(pipeline, []), expected["plain"], atol=5e-3)
    pipeline.save_context_adapter(tmp_path)
