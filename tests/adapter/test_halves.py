"""The halves of an adapter, its tokens and its LoRAs, act as one whatever else sets one of them."""

import warnings

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_context_module, make_pipeline
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module
from diffusers_ctx.adapter_format import AdapterError


def sample(pipeline, **arguments) -> np.ndarray:
    defaults = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a picture of a circle", **(defaults | {"interventions": ["snow"]} | arguments)).images


def add_loras(pipeline) -> None:
    torch.manual_seed(4)
    for model, layers in ((pipeline.unet, ["to_q", "to_v"]), (pipeline.text_encoder, ["q_proj", "v_proj"])):
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers), LORA_ADAPTER)


@pytest.fixture
def folder(tmp_path):
    trained = attach_random_module(make_pipeline())
    add_loras(trained)
    return trained.save_context_adapter(tmp_path / "adapter")


@pytest.fixture
def pipeline(folder) -> ComposablePipeline:
    pipeline = make_pipeline()
    pipeline.load_context_adapter(folder)
    return pipeline


@pytest.fixture
def in_prompt(tmp_path):
    """An adapter with a LoRA whose tokens are in the prompt."""
    trained = make_pipeline()
    attach_context_module(trained.unet, make_context_module(), "prompt")
    add_loras(trained)
    return trained.save_context_adapter(tmp_path / "in_prompt")


def said(use) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    return [str(warning.message) for warning in caught if "context adapter" in str(warning.message)]


# what a call sets


@pytest.mark.parametrize("own", [1.0, 0.5])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_a_call_that_weighs_loras_weighs_the_tokens(pipeline, own, scale):
    pipeline.set_context_scale(own * scale)
    expected = sample(pipeline)
    pipeline.set_context_scale(own)
    before = sample(pipeline)
    np.testing.assert_allclose(sample(pipeline, cross_attention_kwargs={"scale": scale}), expected, atol=1e-5)
    assert not said(lambda: np.testing.assert_allclose(sample(pipeline), before, atol=1e-5))


def test_an_adapter_without_loras_takes_no_notice():
    pipeline = attach_random_module(make_pipeline())
    expected = sample(pipeline)
    np.testing.assert_array_equal(sample(pipeline, cross_attention_kwargs={"scale": 0.5}), expected)


def test_tokens_in_the_prompt_are_whole_or_off(in_prompt):
    pipeline = make_pipeline()
    plain = sample(pipeline, interventions=None)
    pipeline.load_context_adapter(in_prompt)
    expected = sample(pipeline)
    np.testing.assert_allclose(sample(pipeline, cross_attention_kwargs={"scale": 0.0}), plain, atol=1e-5)
    with pytest.raises(ValueError, match="the scale can be 0 or 1"):
        sample(pipeline, cross_attention_kwargs={"scale": 0.5})
    np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5)


# fused projections


@pytest.mark.parametrize("kind", ["folder", "in_prompt"])
def test_loras_do_not_act_on_fused_projections(request, kind):
    folder = request.getfixturevalue(kind)
    pipeline = make_pipeline()
    pipeline.load_context_adapter(folder)
    expected = sample(pipeline)
    pipeline.fuse_qkv_projections()
    with pytest.raises((ValueError, RuntimeError), match=r"unfuse_qkv_projections\(\)"):
        sample(pipeline)
    pipeline.unfuse_qkv_projections()
    np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5)
    pipeline.unload_context_adapter()
    pipeline.fuse_qkv_projections()
    before = sample(pipeline, interventions=None)
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\)"):
        pipeline.load_context_adapter(folder)
    np.testing.assert_array_equal(sample(pipeline, interventions=None), before)
    pipeline.unfuse_qkv_projections()
    pipeline.load_context_adapter(folder)
    np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5)


def test_an_adapter_without_loras_acts_on_fused_projections(tmp_path):
    trained = attach_random_module(make_pipeline())
    pipeline = make_pipeline()
    pipeline.fuse_qkv_projections()
    pipeline.load_context_adapter(trained.save_context_adapter(tmp_path))
    np.testing.assert_allclose(sample(pipeline), sample(trained), atol=1e-5)
    pipeline.unfuse_qkv_projections()
    np.testing.assert_allclose(sample(pipeline), sample(trained), atol=1e-5)


def test_an_adapter_outlives_fusing_saving_and_unfusing(pipeline, tmp_path):
    expected = sample(pipeline)
    pipeline.fuse_qkv_projections()
    pipeline.save_pretrained(tmp_path)
    pipeline.unfuse_qkv_projections()
    np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5)


# what other pipelines and the models themselves set


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: StableDiffusionPipeline.from_pipe(pipeline).set_ip_adapter_scale(0.0),
        lambda pipeline: pipeline.unet.set_adapters([LORA_ADAPTER], [0.3]),
    ],
)
def test_one_half_that_was_weighed_is_noticed_and_mended(pipeline, change):
    expected = sample(pipeline)
    assert not said(lambda: sample(pipeline))
    change(pipeline)
    (message,) = set(said(lambda: sample(pipeline)))
    assert (
        message.endswith("call `pipe.set_context_scale(1)`.") or "call `pipe.set_context_scale(1)`, between" in message
    )
    pipeline.set_context_scale(1)
    assert not said(lambda: np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5))


def test_a_lora_fused_with_another_weight_is_noticed_and_mended(pipeline):
    pipeline.set_context_scale(0.5)
    half = sample(pipeline)
    pipeline.set_context_scale(1)
    whole = sample(pipeline)
    pipeline.fuse_lora(lora_scale=0.5)
    assert "between `unfuse_lora()` and `fuse_lora()`" in said(lambda: sample(pipeline))[0]
    pipeline.set_context_scale(1)  # leaves what is fused
    pipeline.unfuse_lora()
    pipeline.set_context_scale(1)
    np.testing.assert_allclose(sample(pipeline), whole, atol=1e-4)
    pipeline.set_context_scale(0.5)
    pipeline.fuse_lora()
    assert not said(lambda: np.testing.assert_allclose(sample(pipeline), half, atol=1e-4))


def test_half_of_the_loras_is_not_the_adapter(pipeline, tmp_path):
    expected = sample(pipeline)
    embeds, negative = pipeline.encode_prompt("a picture of a circle", "cpu", 1, True)
    text_encoder, pipeline.text_encoder = pipeline.text_encoder, None  # it has done its work
    got = pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        interventions=["snow"],
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    )
    np.testing.assert_allclose(got.images, expected, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"LoRA of .*text_encoder"):
        pipeline.save_context_adapter(tmp_path / "again")
    pipeline.text_encoder = text_encoder
    text_encoder.delete_adapter(LORA_ADAPTER)
    with pytest.raises(RuntimeError, match="LoRA has been removed"):
        sample(pipeline)


def test_what_keeps_a_lora_from_loading_is_said(folder, monkeypatch):
    pipeline = make_pipeline()
    for error in (torch.OutOfMemoryError("no memory left"), PermissionError("not yours")):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(pipeline, "load_lora_into_unet", fail)
        with pytest.raises(AdapterError, match=rf"cannot be loaded \({type(error).__name__}: {error}\)"):
            pipeline.load_context_adapter(folder)
