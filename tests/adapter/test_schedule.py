"""An adapter that was trained with another noise schedule than its base model's brings it along."""

import json

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_components
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER, set_context_scheduler


OPTIONS = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def epsilon_pipeline(scheduler_class=DDIMScheduler) -> ComposablePipeline:
    pipeline = ComposablePipeline(**make_components(prediction_type="epsilon"), requires_safety_checker=False)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if scheduler_class is PNDMScheduler:
        schedule["skip_prk_steps"] = True  # as in Stable Diffusion 1.5
    pipeline.scheduler = scheduler_class(**schedule, prediction_type="epsilon")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **arguments) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a street", num_inference_steps=3, output_type="np", generator=generator, **arguments).images


def add_random_lora(pipeline: ComposablePipeline) -> ComposablePipeline:
    torch.manual_seed(3)
    pipeline.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), LORA_ADAPTER)
    return pipeline


@pytest.fixture
def trained() -> ComposablePipeline:
    pipeline = add_random_lora(attach_random_module(epsilon_pipeline()))
    set_context_scheduler(pipeline, OPTIONS)
    return pipeline


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_loading_sets_the_schedule_and_unloading_gives_the_old_one_back(trained, scheduler_class, tmp_path):
    folder = trained.save_context_adapter(tmp_path / "adapter")
    config = json.loads((folder / "context_adapter_config.json").read_text())
    assert config["scheduler"] == OPTIONS and config["base"]["prediction_type"] == "epsilon"

    pipeline = epsilon_pipeline(scheduler_class)
    plain, before = pipeline.scheduler, sample(pipeline)
    pipeline.load_context_adapter(folder)
    knows_it = scheduler_class is not PNDMScheduler
    assert type(pipeline.scheduler) is (scheduler_class if knows_it else DDIMScheduler)
    assert {name: pipeline.scheduler.config[name] for name in OPTIONS} == OPTIONS
    if not knows_it:
        assert not pipeline.scheduler.config.clip_sample  # latents are no pixels
    if scheduler_class is DDIMScheduler:
        np.testing.assert_array_equal(
            sample(pipeline, interventions=["snow"]), sample(trained, interventions=["snow"])
        )
    else:
        assert np.isfinite(sample(pipeline, interventions=["snow"])).all()
    pipeline.unload_context_adapter()
    assert pipeline.scheduler is plain
    np.testing.assert_array_equal(sample(pipeline), before)


def test_loaded_and_saved_again_it_says_the_same(trained, tmp_path):
    first = trained.save_context_adapter(tmp_path / "first")
    pipeline = epsilon_pipeline()
    pipeline.load_context_adapter(first)
    again = pipeline.save_context_adapter(tmp_path / "again")
    first, again = (json.loads((x / "context_adapter_config.json").read_text()) for x in (first, again))
    assert first["scheduler"] == again["scheduler"] and first["base"] == again["base"]


def test_the_plain_pipeline_is_saved_with_its_own_schedule(trained, tmp_path):
    trained.save_pretrained(str(tmp_path))
    assert StableDiffusionPipeline.from_pretrained(str(tmp_path)).scheduler.config.prediction_type == "epsilon"
    assert trained.scheduler.config.prediction_type == "v_prediction"


def test_an_adapter_of_the_base_models_own_schedule_leaves_the_scheduler_alone(tmp_path):
    pipeline = attach_random_module(epsilon_pipeline())
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    folder = pipeline.save_context_adapter(tmp_path / "adapter")
    assert "scheduler" not in json.loads((folder / "context_adapter_config.json").read_text())
