"""`diffusers-ctx export`: what it writes loads, and draws the same images."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.adapter import attach_context_module, copy_adapter
from diffusers_ctx.adapter_format import ADAPTER_FOLDER, adapter_files, read_adapter_config
from diffusers_ctx.commands import main
from diffusers_ctx.hub import render_model_card
from diffusers_ctx.pipelines.adapted import load_adapted_pipeline


CARD = Path(embedded_adapter("quad"), "README.md").read_text(encoding="utf-8")


MODULE = "context_module/diffusion_pytorch_model.safetensors"


def sample(pipeline: ComposablePipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    return pipeline("a circle", interventions=["quad1"], generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    return sample(pipeline)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 0.03)])
def test_a_pipeline_with_its_adapter(dtype, tolerance, expected, tmp_path, capsys):
    folder = tmp_path / "pipeline"
    assert main(["export", "quad", "--output_dir", str(folder), "--dtype", dtype]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    loaded = ComposablePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    np.testing.assert_allclose(sample(loaded), expected, atol=tolerance)
    assert type(DiffusionPipeline.from_pretrained(folder)) is StableDiffusionPipeline
    assert (folder / ADAPTER_FOLDER / "README.md").read_text(encoding="utf-8") == CARD
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    module, exported = (Path(place, MODULE) for place in (embedded_adapter("quad"), folder / ADAPTER_FOLDER))
    assert exported.read_bytes() == module.read_bytes()
    assert main(["export", str(folder / ADAPTER_FOLDER), "--output_dir", str(folder)]) == 1


def test_the_safety_checker_of_the_base_model_is_kept(tmp_path):
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config=tower | {"image_size": 8, "patch_size": 4}, text_config=tower, projection_dim=4)
    base = ComposablePipeline.from_pretrained(
        embedded_base(),
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(size=8, crop_size=8),
        requires_safety_checker=True,
    )
    base.save_pretrained(tmp_path / "base")
    folder = tmp_path / "pipeline"
    flags = ["--output_dir", str(folder), "--pretrained_model_name_or_path", str(tmp_path / "base")]
    assert main(["export", "quad", *flags]) == 0
    exported = ComposablePipeline.from_pretrained(folder)
    assert exported.config.requires_safety_checker
    weights = base.safety_checker.state_dict()
    torch.testing.assert_close(exported.safety_checker.state_dict(), weights, rtol=0, atol=0)
    assert load_adapted_pipeline(embedded_adapter("quad"), tmp_path / "base").pipeline.safety_checker is None


def test_the_card_says_what_was_measured_and_how_to_use_the_pipeline(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(embedded_adapter("quad"), adapter)
    card = {"results": {"dataset": "quad", "metrics": {"distance": {"quad1": 0.125}}}, "training": {"seed": 7}}
    render_model_card(read_adapter_config(adapter), **card).save(adapter / "README.md")
    folder = tmp_path / "pipeline"
    assert main(["export", str(adapter), "--output_dir", str(folder)]) == 0
    within = render_model_card(read_adapter_config(adapter), **card, within_pipeline=True)
    assert (folder / ADAPTER_FOLDER / "README.md").read_text(encoding="utf-8") == str(within)


def test_a_copy_has_nothing_of_the_adapter_that_was_there_before(plain_pipeline, context_module, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(embedded_adapter("quad"), target)
    for name in ("training_config.json", "notes.txt"):
        (target / name).write_text("{}")
    attach_context_module(plain_pipeline.unet, context_module)
    plain_pipeline.save_context_adapter(source)
    (source / "README.md").unlink()
    copy_adapter(source, target, torch.float16)
    files = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
    assert files == {*adapter_files(read_adapter_config(source)), "notes.txt"}


def test_an_adapter_of_half_the_size_loads_into_any_pipeline(expected, tmp_path):
    folder = tmp_path / "adapter"
    assert main(["export", "quad", "--output_dir", str(folder), "--dtype", "float16", "--adapter_only"]) == 0
    assert (folder / "README.md").read_text(encoding="utf-8") == CARD
    for name in ("context_adapter.safetensors", "pytorch_lora_weights.safetensors"):
        whole, half = load_file(Path(embedded_adapter("quad"), name)), load_file(folder / name)
        for key, weight in whole.items():
            torch.testing.assert_close(half[key], weight.half(), rtol=0, atol=0)
    for dtype, tolerance in ((torch.float32, 0.03), (torch.bfloat16, 0.3)):
        pipeline = ComposablePipeline.from_pretrained(embedded_base(), torch_dtype=dtype)
        pipeline.load_context_adapter(folder)
        assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {dtype}
        assert np.abs(sample(pipeline) - expected).max() < tolerance
    assert main(["export", str(folder), "--output_dir", str(folder), "--adapter_only"]) == 1
