import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ctx.hub import render_model_card, save_model_card

from .hub_double import HubDouble


CONFIG = {
    "format_version": 1,
    "library": "diffusers_ctx",
    "library_version": "0.1.0",
    "base_model_name_or_path": "some-org/some-base",
    "base": {"cross_attention_dim": 32},
    "concepts": ["night", "snow"],
    "obs_context": "obs",
    "mode": "lora",
    "injection": "cross_attention",
}


def write_adapter(folder: Path, **changes) -> Path:
    """Writes a tiny adapter with the layout of a real one; `changes` go into its config."""
    config = CONFIG | changes
    module = folder / "context_module"
    module.mkdir(parents=True)
    (folder / "context_adapter_config.json").write_text(json.dumps(config))
    (module / "config.json").write_text(json.dumps({"_class_name": "ContextModule"}))
    save_file({"mechanism": torch.arange(6.0)}, module / "diffusion_pytorch_model.safetensors")
    save_file({"to_k_ip": torch.arange(8.0)}, folder / "context_adapter.safetensors")
    if config["mode"] == "lora":
        save_file({"unet.lora_A": torch.arange(4.0)}, folder / "pytorch_lora_weights.safetensors")
    save_model_card(render_model_card(config), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what is in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


@pytest.fixture
def hub():
    with HubDouble() as hub:
        yield hub
