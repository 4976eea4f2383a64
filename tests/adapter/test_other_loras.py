"""LoRAs of the user's own beside an adapter's: both act, unless one is switched off, which is said."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER


INACTIVE = r'set_adapters(["context", ...])'


def missed(caplog) -> list[str]:
    return [message for message in caplog.messages if INACTIVE in message]


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


def test_a_lora_that_is_loaded_leaves_the_adapters_active_with_its_weight(pipeline, style, caplog):
    pipeline.set_context_scale(0.5)
    pipeline.load_lora_weights(style, adapter_name="style")
    assert pipeline.unet.active_adapters() == ["style", LORA_ADAPTER]
    assert pipeline.text_encoder.active_adapters() == [LORA_ADAPTER]
    both = sample(pipeline)
    pipeline.set_adapters(["style", LORA_ADAPTER], [1.0, 0.5])
    np.testing.assert_array_equal(sample(pipeline), both)
    pipeline.set_adapters(LORA_ADAPTER, 0.5)
    assert np.abs(sample(pipeline) - both).max() > 1e-3
    pipeline.set_adapters(["style", LORA_ADAPTER], [1.0, 0.5])
    pipeline.fuse_lora()
    sample(pipeline)
    assert not missed(caplog)


def test_an_adapters_lora_that_was_switched_off_stays_so(pipeline, style):
    add_lora(pipeline.unet, "other", ("to_q",))
    pipeline.set_adapters(["other"])
    pipeline.load_lora_weights(style, adapter_name="style")
    assert pipeline.unet.active_adapters() == ["style"]


@pytest.mark.parametrize("switch_off", ["set_adapters", "disable_lora"])
@pytest.mark.parametrize("use", ["sample", "infer"])
def test_an_adapters_lora_that_is_not_active_is_missed_once(pipeline, style, caplog, switch_off, use):
    pipeline.load_lora_weights(style, adapter_name="style")
    sample(pipeline)
    assert not missed(caplog)
    if switch_off == "set_adapters":
        pipeline.set_adapters(["style"])
    else:
        pipeline.disable_lora()
    for _ in range(2):
        if use == "sample":
            sample(pipeline)
        else:
            pipeline.infer_exogenous_noise(torch.zeros(1, 3, 32, 32))
    assert len(missed(caplog)) == 1
