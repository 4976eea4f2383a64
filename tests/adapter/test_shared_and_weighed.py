"""An adapter with LoRAs and a schedule: weighed, shared between pipelines, and robbed of its parts."""

import json

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_components
from diffusers import StableDiffusionPipeline
from test_schedule import OPTIONS, add_random_lora, epsilon_pipeline, sample

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.adapter import set_context_scheduler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter of mode lora, without a schedule of its own."""
    return add_random_lora(attach_random_module(epsilon_pipeline())).save_context_adapter(
        tmp_path_factory.mktemp("adapter")
    )


@pytest.fixture(scope="module")
def scheduled_folder(tmp_path_factory):
    """The same, with a schedule of its own."""
    pipeline = add_random_lora(attach_random_module(epsilon_pipeline()))
    set_context_scheduler(pipeline, OPTIONS)
    return pipeline.save_context_adapter(tmp_path_factory.mktemp("scheduled"))


def test_scale_zero_is_the_plain_model_and_one_the_adapter():
    def draw(pipeline, **arguments) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        prompt = "a picture of a square"
        return pipeline(prompt, num_inference_steps=2, output_type="np", generator=generator, **arguments).images

    plain = StableDiffusionPipeline.from_pretrained(embedded_base())
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    whole = draw(pipeline, interventions=["quad4"])
    pipeline.set_context_scale(0)
    np.testing.assert_array_equal(draw(pipeline, interventions=["quad4"]), draw(plain))
    pipeline.set_context_scale(1)
    np.testing.assert_array_equal(draw(pipeline, interventions=["quad4"]), whole)


def test_a_schedule_cannot_be_weighed(scheduled_folder):
    pipeline = epsilon_pipeline()
    pipeline.load_context_adapter(scheduled_folder)
    pipeline.set_context_scale(1)
    expected = sample(pipeline, interventions=["snow"])
    pipeline.set_adapters(["context"])
    for use in (
        lambda: pipeline.set_context_scale(0),
        lambda: pipeline.set_adapters(["context"], [0.5]),
        pipeline.disable_lora,
    ):
        with pytest.raises(ValueError, match=r"call `unload_context_adapter\(\)`"):
            use()
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]), expected)


def test_a_pipeline_made_from_another_knows_the_adapter(scheduled_folder, tmp_path):
    first = epsilon_pipeline()
    plain = first.scheduler
    first.load_context_adapter(scheduled_folder)
    second = ComposablePipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    folder = second.save_context_adapter(tmp_path / "again")
    config = json.loads((folder / "context_adapter_config.json").read_text())
    assert config["scheduler"] == OPTIONS and config["base"]["prediction_type"] == "epsilon"
    assert config["mode"] == "lora"
    epsilon_pipeline().load_context_adapter(folder)
    second.unload_context_adapter()
    assert second.scheduler is plain


def test_a_pipeline_that_shares_the_unet_but_not_the_schedule_is_refused(scheduled_folder, tmp_path):
    first = epsilon_pipeline()
    second = ComposablePipeline.from_pipe(first)
    first.load_context_adapter(scheduled_folder)
    for use in (lambda: sample(second, interventions=["snow"]), lambda: second.save_context_adapter(tmp_path)):
        with pytest.raises(RuntimeError, match=r"trained for v_prediction, and .* is for epsilon"):
            use()


@pytest.mark.parametrize("name", ["folder", "scheduled_folder"])
def test_loading_twice_says_that_it_is_loaded(name, request):
    pipeline = epsilon_pipeline()
    pipeline.load_context_adapter(request.getfixturevalue(name))
    with pytest.raises(ValueError, match="already has"):
        pipeline.load_context_adapter(request.getfixturevalue(name))


def test_an_adapter_without_its_lora_is_refused(folder, tmp_path):
    pipeline = epsilon_pipeline()
    pipeline.load_context_adapter(folder)
    whole = sample(pipeline, interventions=["snow"])
    pipeline.unload_lora_weights()
    for use in (lambda: sample(pipeline, interventions=["snow"]), lambda: pipeline.save_context_adapter(tmp_path)):
        with pytest.raises(RuntimeError, match="LoRA has been removed"):
            use()
    pipeline.unload_context_adapter()
    pipeline.load_context_adapter(folder)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]), whole)


def test_a_fused_lora_cannot_be_unloaded_weighed_or_saved_as_the_base(folder, tmp_path):
    pipeline = epsilon_pipeline()
    before = sample(pipeline)
    pipeline.load_context_adapter(folder)
    pipeline.fuse_lora()
    fused = sample(pipeline, interventions=["snow"])
    uses = [pipeline.unload_context_adapter, lambda: pipeline.set_context_scale(0), pipeline.unload_lora_weights]
    uses.append(lambda: pipeline.save_pretrained(tmp_path / "base"))
    for use in uses:
        with pytest.raises(ValueError, match=r"call `unfuse_lora\(\)` first"):
            use()
        np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]), fused)
    assert not (tmp_path / "base").exists()
    pipeline.unfuse_lora()
    pipeline.unload_context_adapter()
    np.testing.assert_allclose(sample(pipeline), before, atol=1e-4)


def test_a_schedule_needs_an_adapter():
    pipeline = ComposablePipeline(**make_components(prediction_type="epsilon"), requires_safety_checker=False)
    with pytest.raises(ValueError, match="No context adapter is loaded"):
        set_context_scheduler(pipeline, OPTIONS)
