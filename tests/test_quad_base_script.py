"""The script that pretrains the small base, going on from the base that it made."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_ctx import embedded_base


SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_quad_base.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_quad_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES_PER_DRAW", 8)
    return module


def train(script, monkeypatch, folder: Path, steps: int, *flags: str) -> list[float]:
    """The losses of so many steps from the embedded base on."""
    options = ["--pretrained_model_name_or_path", embedded_base(), "--output_dir", str(folder), *flags]
    options += ["--train_batch_size", "16", "--max_train_steps", str(steps), "--log_every", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "unet", "--lr_warmup_steps", "2", *options])
    torch.manual_seed(0)
    script.train_unet(script.parse_args())
    return [json.loads(line)["loss"] for line in (folder / "logs" / "unet.jsonl").read_text().splitlines()]


def noise_error(pipeline: StableDiffusionPipeline) -> float:
    """How far the UNet's output is from the noise, where there is little else."""
    torch.manual_seed(1)
    noise = torch.randn(32, 4, 8, 8)
    text = pipeline.text_encoder(pipeline.tokenizer([""] * 32, return_tensors="pt").input_ids)[0]
    with torch.no_grad():
        return (pipeline.unet(noise, torch.tensor([990] * 32), text).sample - noise).square().mean().item()


def test_a_base_learns_to_predict_the_noise_of_stable_diffusion_1(script, monkeypatch, tmp_path):
    losses = train(script, monkeypatch, tmp_path, 20, "--prediction_type", "epsilon")
    assert losses[-1] < 0.5 * losses[0]
    made = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    base = StableDiffusionPipeline.from_pretrained(embedded_base(), torch_dtype=torch.float32)
    assert noise_error(made) < 0.5 < 0.8 < noise_error(base)
    original = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert made.scheduler.config.prediction_type == "epsilon"
    assert torch.equal(made.scheduler.alphas_cumprod, original.alphas_cumprod)


def test_without_the_flag_a_base_goes_on_as_it_was_trained(script, monkeypatch, tmp_path):
    losses = train(script, monkeypatch, tmp_path, 3)
    assert max(losses) < 0.5  # from what it knows, and not from nothing
    made = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    base = DDIMScheduler.from_pretrained(embedded_base(), subfolder="scheduler")
    options = {key: value for key, value in base.config.items() if not key.startswith("_")}
    assert options.items() <= dict(made.config).items()
    assert made.alphas_cumprod[-1] == 0


def test_captions_that_are_encoded_once_are_encoded_right(script):
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_base(), torch_dtype=torch.float32)
    captions = ["a picture of a square", "", "a picture of a circle", "a picture of a square"]
    tokens = pipeline.tokenizer(captions, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.no_grad():
        encoded = script.encode_prompts(pipeline.tokenizer, pipeline.text_encoder, captions)
        torch.testing.assert_close(encoded, pipeline.text_encoder(tokens)[0])


def test_images_are_drawn_in_other_processes_too(script):
    (here, captions), (there, others) = (next(script.pooled_draws(0, num_workers)) for num_workers in (0, 1))
    assert here.shape == there.shape == (56, 64, 64, 3) and len(captions) == len(others) == 56
