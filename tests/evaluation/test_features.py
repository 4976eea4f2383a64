import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.features import autoencode, latent_features


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
