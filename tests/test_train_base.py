"""The script that pretrains small bases: on folders, and going on from the base that it made."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from beds.bed import write_folder
from diffusers import DDIMScheduler, StableDiffusionPipeline, Transformer2DModel
from PIL import Image

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad


SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_base.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import base_pictures
    import train_base

    monkeypatch.setattr(base_pictures, "QUAD_IMAGES_PER_DRAW", 8)
    return train_base


def written(folder: Path, images: np.ndarray, captions: list[str]) -> Path:
    write_folder(folder, images, captions)
    return folder


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
    (here, captions), (there, others) = (next(script.Quad().draws(0, num_workers)) for num_workers in (0, 1))
    assert here.shape == there.shape == (56, 64, 64, 3) and len(captions) == len(others) == 56


def test_folders_are_drawn_from_by_their_weights_with_their_captions(script, tmp_path):
    colors = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    folders = [
        written(tmp_path / name, np.tile(np.uint8(color), (3, 64, 64, 1)), [f"a {name} square"] * 3)
        for name, color in colors.items()
    ]
    images, captions = next(script.Folders(folders, [3, 1], images_per_draw=400).draws(0, 0))
    assert 260 < captions.count("a red square") < 340
    for image, caption in zip(images, captions):
        assert tuple(image[32, 32].tolist()) == colors[caption.split()[1]]


def test_pictures_are_moved_a_little_and_no_more(script, tmp_path):
    image = np.full((64, 64, 3), 255, np.uint8)
    image[24:40, 24:40] = 0
    folder = written(tmp_path / "squares", image[None], ["a square"])
    images, _ = next(script.Folders([folder], [1], images_per_draw=50).draws(0, 0))
    dark = (images[..., 0] < 128).float()
    rows = torch.arange(64.0)
    centres = (dark.sum(2) * rows).sum(1) / dark.sum((1, 2))
    assert 1 < (centres - 31.5).abs().max() < 3 and centres.std() > 0.5
    assert 200 < dark.sum((1, 2)).min() and dark.sum((1, 2)).max() < 310


def test_a_folder_without_captions(script, tmp_path):
    (tmp_path / "cats").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "cats" / "0.png")
    with pytest.raises(ValueError, match=r"cats has no captions: give it a metadata.csv"):
        script.Folders([tmp_path / "cats"], [1])
    with pytest.raises(ValueError, match="1 folders and 2 weights"):
        script.Folders([tmp_path / "cats"], [1, 2])


def attention_sizes(unet) -> set[int]:
    """Rows of the samples that a UNet's attention sees."""
    sizes = set()
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_pre_hook(lambda _, inputs: sizes.add(inputs[0].shape[-1]))
    size, text = unet.config.sample_size, torch.zeros(1, 24, 128)
    unet(torch.zeros(1, unet.config.in_channels, size, size), 1, text)
    return sizes


@pytest.mark.parametrize("channels, levels", [(4, 4), (8, 3)])
def test_a_base_is_trained_on_folders(script, monkeypatch, tmp_path, channels, levels):
    # as few as the scale of latents is measured on
    monkeypatch.setattr(script, "Folders", partial(script.Folders, images_per_draw=512))
    sample = quad.generate(n=16, seed=0)
    folder = written(tmp_path / "quad", sample.images, sample.captions)
    options = ["--output_dir", str(tmp_path / "base"), "--train_data_dir", str(folder), "--log_every", "2"]
    options += ["--max_train_steps", "4", "--train_batch_size", "4", "--lr_warmup_steps", "2"]
    options += ["--vae_channels", *["16"] * levels, "--unet_channels", "16", "32", "--save_every", "3"]
    for stage, train in {"autoencoder": script.train_autoencoder, "unet": script.train_unet}.items():
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), stage, *options, "--latent_channels", str(channels)])
        train(script.parse_args())
        logged = (tmp_path / "base" / "logs" / f"{stage}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in logged] == [2, 4]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", torch_dtype=torch.float32)
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels == channels
    assert pipeline.unet.config.sample_size * pipeline.vae_scale_factor == 64
    assert len(attention_sizes(pipeline.unet)) > 0 and max(attention_sizes(pipeline.unet)) <= 8
    assert pipeline.tokenizer.tokenize("a picture of a circle") == [
        "a</w>",
        "picture</w>",
        "of</w>",
        "a</w>",
        "circle</w>",
    ]
    image = pipeline("a picture of a circle", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and image.std() > 0
