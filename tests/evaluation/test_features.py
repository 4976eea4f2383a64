import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.features import autoencode, clip_features, latent_features


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(embedded_base(), subfolder="vae").eval()


def test_latents_are_the_means_of_the_autoencoder_in_any_batches(vae):
    images = quad.generate(n=5, seed=51).images
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean.numpy().reshape(5, -1)
    for batch_size in (2, 5, 16):
        np.testing.assert_allclose(latent_features(vae, batch_size)(images), expected, atol=1e-4)


def test_an_autoencoder_gives_back_what_it_was_trained_on(vae):
    images = quad.generate(n=4, seed=52).images
    result = autoencode(vae, images)
    assert result.dtype == np.uint8 and result.shape == images.shape
    errors = [np.abs(result - other.astype(float)).mean() / 255 for other in (images, images[::-1])]
    assert errors[0] < 0.03 < 0.2 < errors[1]


def test_embeddings_of_clip_are_of_normalised_pixels_in_any_batches(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=64, patch_size=16, projection_dim=5))
    model.eval().save_pretrained(tmp_path)
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessor(**size, image_mean=mean, image_std=std).save_pretrained(tmp_path)
    images = quad.generate(n=5, seed=53).images  # of the model's size: nothing is resized
    pixels = (torch.from_numpy(images) / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        expected = model(pixels.permute(0, 3, 1, 2)).image_embeds.numpy()
    assert expected.shape == (5, 5)
    for batch_size in (2, 16):
        np.testing.assert_allclose(clip_features(str(tmp_path), batch_size=batch_size)(images), expected, atol=1e-4)
