"""What an adapter's folder must hold, and what is refused before anything of it is loaded."""

import json
from pathlib import Path

import pytest
import torch
from hub.conftest import CONFIG, write_adapter
from safetensors.torch import save_file

from diffusers_ctx.adapter_format import FORMAT_VERSION, AdapterError, read_adapter_config, validate_adapter_folder


WEIGHTS = (
    "context_adapter.safetensors",
    "context_module/diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write_adapter(tmp_path / "adapter")


def refuses(folder, *words: str) -> None:
    """Asserts one error that says all the words."""
    with pytest.raises(AdapterError) as error:
        validate_adapter_folder(folder)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_whole_adapter_is_accepted(tmp_path, mode):
    assert validate_adapter_folder(write_adapter(tmp_path / "a", mode=mode)) == CONFIG | {"mode": mode}


def test_no_folder_at_all(tmp_path):
    refuses(tmp_path / "gone", str(tmp_path / "gone"), "pass the folder that `save_context_adapter` wrote")


@pytest.mark.parametrize(
    ("text", "word"), [("{", "not valid JSON"), ("[]", "no JSON object"), ("\xff", "not valid JSON")]
)
@pytest.mark.parametrize("name", ["context_adapter_config.json", "context_module/config.json"])
def test_a_config_that_is_no_json(adapter, name, text, word):
    (adapter / name).write_text(text, encoding="latin-1")
    refuses(adapter, name, word)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"library": "another"}, "'another'"),
        ({"library": None}, "was not written by diffusers_ctx"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade diffusers_ctx"),
        ({"format_version": 0}, "unknown format version 0"),
        ({"format_version": True}, "unknown format version True"),
        ({"format_version": "1"}, "unknown format version '1'"),
        ({"base": None}, "`base`"),
        ({"concepts": "night"}, "`concepts`"),
        ({"concepts": []}, "at least one"),
        ({"concepts": ["night", ""]}, "must be names"),
        ({"concepts": ["night", 3]}, "must be names"),
        ({"concepts": ["night", "snow", "night"]}, "names night more than once"),
        ({"concepts": ["obs", "night"]}, "rename one"),
        ({"obs_context": None}, "`obs_context`"),
        ({"mode": "frosen"}, "frozen, lora, full"),
        ({"injection": "text"}, "cross_attention, prompt"),
    ],
)
def test_a_config_that_cannot_be_used(adapter, changes, word):
    path = adapter / "context_adapter_config.json"
    path.write_text(json.dumps(CONFIG | changes))
    refuses(adapter, str(path), word)
    with pytest.raises(AdapterError):
        read_adapter_config(adapter)


@pytest.mark.parametrize("name", [*WEIGHTS, "context_module/config.json"])
def test_a_missing_file(adapter, name):
    (adapter / name).unlink()
    refuses(adapter, str(adapter / name))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("damage", ["cut", "empty", "header", "zip", "pointer"])
def test_weights_that_are_not_whole(adapter, name, damage):
    whole = (adapter / name).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    damaged = {"cut": whole[:-1], "empty": b"", "header": whole[:12], "zip": b"PK\x03\x04" + whole, "pointer": pointer}
    (adapter / name).write_bytes(damaged[damage])
    refuses(adapter, str(adapter / name), "truncated or no safetensors")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_pickled_weights_are_refused_unopened(adapter, name, suffix):
    (adapter / name).unlink()
    pickle = (adapter / name).with_suffix(suffix)
    pickle.write_bytes(b"whoever opens this is wrong")
    refuses(adapter, str(pickle), "pickle", "safetensors")


def test_a_lora_is_asked_for_in_mode_lora_alone(tmp_path):
    folder = write_adapter(tmp_path / "a", mode="frozen")
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    validate_adapter_folder(folder)
    config = folder / "context_adapter_config.json"
    config.write_text(json.dumps(CONFIG))
    refuses(folder, "pytorch_lora_weights.safetensors")


def test_weights_of_every_type_pass(adapter):
    save_file({"k": torch.zeros(3, dtype=torch.bfloat16)}, adapter / "context_adapter.safetensors")
    validate_adapter_folder(adapter)
