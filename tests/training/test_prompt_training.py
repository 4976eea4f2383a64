"""Training with the tokens in the prompt: of the adapter, the read-out alone learns beside the UNet."""

import json

import pytest
import safetensors.torch
import torch

from diffusers_ctx import ComposablePipeline, ContextModule

from .conftest import WITHOUT_SEARCH, create_trainer
from .test_training_script import weights_of


@pytest.fixture
def options(options):
    return options | WITHOUT_SEARCH


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_it_trains_resumes_exactly_and_loads(options, base_model, tmp_path, mode):
    options |= {"injection": "prompt", "mode": mode, "max_train_steps": 4, "checkpointing_steps": 2}
    names = ["context_adapter.safetensors", "context_module/diffusion_pytorch_model.safetensors"]
    names += ["pytorch_lora_weights.safetensors"] if mode == "lora" else []
    create_trainer(options).train()
    expected = weights_of(tmp_path / "adapter", names)
    assert not [name for name in expected if name.startswith("context_adapter.safetensors")]  # there are no processors
    resumed = options | {"resume_from_checkpoint": "checkpoint-2"}
    create_trainer(resumed).train()
    got = weights_of(tmp_path / "adapter", names)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)

    tokens = ContextModule.from_pretrained(tmp_path / "adapter" / "context_module").read_out.norm.weight
    assert tokens.abs().max() > 0  # they start as zeros
    checkpoint = safetensors.torch.load_file(tmp_path / "adapter" / "checkpoint-4" / "trained.safetensors")
    assert any(name.endswith("read_out.norm.weight") for name in checkpoint)
    assert json.loads((tmp_path / "adapter" / "context_adapter_config.json").read_text())["injection"] == "prompt"
    pipeline = ComposablePipeline.from_pretrained(base_model)
    pipeline.load_context_adapter(tmp_path / "adapter")
    assert pipeline.concepts == ["night", "snow"]


def test_a_resume_with_another_injection_is_refused(options):
    create_trainer(options | {"injection": "prompt", "checkpointing_steps": 2}).train()
    with pytest.raises(ValueError, match="`injection` was prompt and is cross_attention"):
        create_trainer(options | {"resume_from_checkpoint": "latest"}).load()
