"""A pipeline that is saved with its context adapter loads with it."""

import logging
import re

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_components, make_pipeline, make_xl_pipeline
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig

from diffusers_ctx import ComposableImg2ImgPipeline, ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER, set_context_scheduler
from diffusers_ctx.adapter_format import ADAPTER_FOLDER, AdapterError, read_adapter_config
from diffusers_ctx.pipelines.adapted import load_adapted_pipeline, recorded_base


def sample(pipeline, **arguments) -> np.ndarray:
    defaults = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a square", **(defaults | arguments)).images


def add_lora(pipeline) -> None:
    torch.manual_seed(3)
    for model, layers in ((pipeline.unet, ["to_q", "to_v"]), (pipeline.text_encoder, ["q_proj", "v_proj"])):
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers), LORA_ADAPTER)


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize(
    ("make", "stock"), [(make_pipeline, StableDiffusionPipeline), (make_xl_pipeline, StableDiffusionXLPipeline)]
)
def test_saved_and_loaded_it_is_the_same(make, stock, has_lora, tmp_path):
    pipeline = attach_random_module(make())
    if has_lora:
        add_lora(pipeline)
    expected = sample(pipeline, interventions=["snow"])
    pipeline.save_pretrained(tmp_path, context_adapter=True)
    np.testing.assert_array_equal(sample(pipeline, interventions=["snow"]), expected)
    options = {"add_watermarker": False} if stock is StableDiffusionXLPipeline else {}
    loaded = type(pipeline).from_pretrained(tmp_path, **options)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(sample(loaded, interventions=["snow"]), expected, atol=1e-5)
    loaded.unload_context_adapter()
    plain = DiffusionPipeline.from_pretrained(tmp_path, **options)
    assert type(plain) is stock
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(sample(loaded), sample(plain))
    np.testing.assert_allclose(sample(plain), sample(make()), atol=1e-5)


def test_a_relative_loads_it_too_and_in_the_given_data_type(tmp_path):
    attach_random_module(make_pipeline()).save_pretrained(tmp_path, context_adapter=True)
    loaded = ComposableImg2ImgPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.concepts == ["night", "snow", "fog"]
    assert {parameter.dtype for parameter in loaded.unet.parameters()} == {torch.bfloat16}


def test_its_noise_schedule_comes_with_it(tmp_path):
    pipeline = ComposablePipeline(**make_components(prediction_type="epsilon"), requires_safety_checker=False)
    set_context_scheduler(attach_random_module(pipeline), {"prediction_type": "v_prediction"})
    pipeline.save_pretrained(tmp_path, context_adapter=True)
    assert StableDiffusionPipeline.from_pretrained(tmp_path).scheduler.config.prediction_type == "epsilon"
    loaded = ComposablePipeline.from_pretrained(tmp_path)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    loaded.unload_context_adapter()
    assert loaded.scheduler.config.prediction_type == "epsilon"


def test_a_pipeline_that_was_trained_as_a_whole(tmp_path, caplog):
    pipeline = attach_random_module(make_pipeline())
    folder = pipeline.save_context_adapter(tmp_path / "adapter", mode="full")
    pipeline.unload_context_adapter()
    pipeline.load_context_adapter(folder)
    caplog.clear()
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    ComposablePipeline.from_pretrained(tmp_path / "pipeline")
    assert "load the pipeline from" not in caplog.text
    within = str(tmp_path / "pipeline" / ADAPTER_FOLDER)
    assert recorded_base(within, read_adapter_config(tmp_path / "pipeline" / ADAPTER_FOLDER)) == str(
        tmp_path / "pipeline"
    )


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_its_card_loads_both(tmp_path, mode):
    pipeline = attach_random_module(make_pipeline())
    if mode == "full":
        folder = pipeline.save_context_adapter(tmp_path / "adapter", mode=mode)
        pipeline.unload_context_adapter()
        pipeline.load_context_adapter(folder)
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    card = (tmp_path / "pipeline" / ADAPTER_FOLDER / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)\nprompt = ", card, flags=re.DOTALL)
    session: dict = {}
    exec(code.replace("path/to/the/pipeline", str(tmp_path / "pipeline")), session)
    loaded = session["pipe"]
    loaded.set_progress_bar_config(disable=True)
    expected = sample(pipeline, interventions=["snow"])
    np.testing.assert_allclose(sample(loaded, interventions=["snow"]), expected, atol=1e-5)


def test_without_it_the_pipeline_is_the_plain_one(tmp_path, caplog):
    pipeline = attach_random_module(make_pipeline())
    pipeline.save_pretrained(tmp_path, context_adapter=True)
    with caplog.at_level(logging.WARNING, "diffusers_ctx"):
        pipeline.save_pretrained(tmp_path)  # over it: an adapter left in the folder is none of this pipeline
    assert "pass `context_adapter=True` to save both" in caplog.text
    assert ComposablePipeline.from_pretrained(tmp_path).context_module is None
    with pytest.raises(ValueError, match="No context adapter is loaded"):
        make_pipeline().save_pretrained(tmp_path / "other", context_adapter=True)
    assert not (tmp_path / "other").exists()


def test_an_adapter_that_is_gone_is_named(tmp_path):
    attach_random_module(make_pipeline()).save_pretrained(tmp_path, context_adapter=True)
    (tmp_path / "context_adapter" / "context_adapter.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"There is no .*context_adapter\.safetensors"):
        ComposablePipeline.from_pretrained(tmp_path)


def test_another_adapter_takes_its_place_on_the_base(tmp_path):
    """In evaluation, which names both."""
    pipeline = attach_random_module(make_pipeline())
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    pipeline.context_module.mechanism.bias_do.data += 1
    folder = pipeline.save_context_adapter(tmp_path / "other")
    loaded = load_adapted_pipeline(folder, tmp_path / "pipeline").pipeline
    assert torch.equal(loaded.context_module.mechanism.bias_do, pipeline.context_module.mechanism.bias_do)
