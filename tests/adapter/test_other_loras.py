"""The user's own LoRAs together with an adapter, which has one scale for its tokens and its LoRA."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER


INACTIVE = r'set_adapters(["context", ...])'


def missed(caught) -> list[str]:
    return [str(warning.message) for warning in caught if INACTIVE in str(warning.message)]


def sample(pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"interventions": ["snow"], "num_inference_steps": 2, "output_type": "np", "generator": generator}
    return pipeline("a picture of a circle", **arguments).images


def add_lora(model, name: str, targets: tuple[str, ...]) -> None:
    torch.manual_seed(len(name))
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets)), name)


@pytest.fixture
def pipeline(tmp_path) -> ComposablePipeline:
    """A pipeline with an adapter of mode lora."""
    trained = attach_random_module(make_pipeline())
    add_lora(trained.unet, LORA_ADAPTER, ("to_q", "to_v"))
    add_lora(trained.text_encoder, LORA_ADAPTER, ("q_proj", "v_proj"))
    pipeline = make_pipeline()
    pipeline.load_context_adapter(trained.save_context_adapter(tmp_path / "adapter"))
    return pipeline


@pytest.fixture
def style(tmp_path) -> Path:
    """A LoRA for layers that the adapter's has a part in, and for others."""
    unet = make_pipeline().unet
    add_lora(unet, "style", ("to_q", "to_k"))
    ComposablePipeline.save_lora_weights(
        tmp_path / "style", unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="style")
    )
    return tmp_path / "style"


def test_a_lora_that_is_loaded_leaves_the_adapters_active_with_its_weight(pipeline, style, recwarn):
    pipeline.set_context_scale(0.5)
    pipeline.load_lora_weights(style, adapter_name="style")
    assert pipeline.unet.active_adapters() == ["style", LORA_ADAPTER]
    assert pipeline.text_encoder.active_adapters() == [LORA_ADAPTER]
    both = sample(pipeline)
    pipeline.set_adapters(["style", LORA_ADAPTER], [1.0, 0.5])
    np.testing.assert_array_equal(sample(pipeline), both)
    pipeline.set_adapters(LORA_ADAPTER, 0.5)  # without style
    assert np.abs(sample(pipeline) - both).max() > 1e-3
    pipeline.set_adapters(["style", LORA_ADAPTER], [1.0, 0.5])
    pipeline.fuse_lora()
    sample(pipeline)
    assert not missed(recwarn)


@pytest.fixture(params=[True, False], ids=["lora", "frozen"])
def either(request, pipeline) -> ComposablePipeline:
    """A pipeline whose adapter has a LoRA, or none."""
    return pipeline if request.param else attach_random_module(make_pipeline())


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_both_ways_of_weighing_the_adapter_are_the_same(either, style, scale):
    whole = sample(either)
    either.set_context_scale(scale)
    expected = sample(either)
    either.set_context_scale(1)
    np.testing.assert_array_equal(sample(either), whole)
    either.set_adapters(["context"], [scale])
    np.testing.assert_array_equal(sample(either), expected)
    either.load_lora_weights(style, adapter_name="style")
    either.set_adapters(["style", "context"], [0.0, scale])
    np.testing.assert_allclose(sample(either), expected, atol=1e-5)
    either.set_adapters("context")
    np.testing.assert_allclose(sample(either), whole, atol=1e-5)
    layers = [module for module in either.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any("style" in layer.active_adapters for layer in layers)


def test_scale_zero_is_the_plain_model_and_leaves_other_loras(either, style):
    plain = make_pipeline()
    plain.load_lora_weights(style, adapter_name="style")
    either.load_lora_weights(style, adapter_name="style")
    either.set_adapters(["style", "context"], [0.7, 0.0])
    plain.set_adapters(["style"], [0.7])
    arguments = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    expected = plain("a picture of a circle", **arguments).images
    np.testing.assert_allclose(sample(either), expected, atol=1e-5)


def test_the_adapter_keeps_its_scale_where_it_is_not_named(either, style, recwarn):
    either.load_lora_weights(style, adapter_name="style")
    either.set_adapters(["style", "context"], [0.7, 0.5])
    expected = sample(either)
    either.set_adapters(["style"], 0.7)
    np.testing.assert_array_equal(sample(either), expected)
    assert not missed(recwarn)


def test_a_mistake_in_set_adapters_changes_nothing(either):
    expected = sample(either)
    for names, weights, message in (
        (["context", "nobody"], [0.5, 1.0], "nobody"),
        (["context"], [0.5, 1.0], "1 names of adapters and 2 weights"),
        (["context"], [-1.0], "must be 0 or more"),
        (["context"], [{"unet": 0.5}], "is one number"),
    ):
        with pytest.raises(ValueError, match=message):
            either.set_adapters(names, weights)
        np.testing.assert_array_equal(sample(either), expected)


def test_disabled_loras_take_an_adapter_with_one_along(pipeline, style, recwarn):
    plain = sample_plain()
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["style", "context"], [0.7, 0.5])
    expected = sample(pipeline)
    pipeline.disable_lora()
    np.testing.assert_allclose(sample(pipeline), plain, atol=1e-5)
    pipeline.set_context_scale(2.0)  # takes effect when they are enabled
    np.testing.assert_allclose(sample(pipeline), plain, atol=1e-5)
    pipeline.set_context_scale(0.5)
    pipeline.enable_lora()
    np.testing.assert_array_equal(sample(pipeline), expected)
    assert not missed(recwarn)


def test_disabled_loras_leave_an_adapter_without_one_alone(style):
    pipeline = attach_random_module(make_pipeline())
    expected = sample(pipeline)
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.disable_lora()
    np.testing.assert_allclose(sample(pipeline), expected, atol=1e-5)


def sample_plain() -> np.ndarray:
    arguments = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return make_pipeline()("a picture of a circle", **arguments).images


@pytest.mark.parametrize("use", ["sample", "infer"])
def test_an_adapters_lora_that_the_model_switched_off_is_missed_once(pipeline, style, use):
    pipeline.load_lora_weights(style, adapter_name="style")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        sample(pipeline)
        assert not missed(caught)
        pipeline.unet.set_adapters(["style"])
        for _ in range(2):
            if use == "sample":
                sample(pipeline)
            else:
                pipeline.infer_exogenous_noise(torch.zeros(1, 3, 32, 32))
    assert len(missed(caught)) == 1
