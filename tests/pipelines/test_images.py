"""Images that counterfactuals are asked of: every layout that diffusers takes is taken, others are named."""

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_ctx.autoencoding import to_pixels


RGB = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
FLOAT = (RGB / 255).astype(np.float32)
BYTES = torch.tensor(RGB).permute(2, 0, 1)
TENSOR = torch.tensor(FLOAT).permute(2, 0, 1)
EXPECTED = 2 * TENSOR[None] - 1
GREY = RGB[..., :1]
EXPECTED_GREY = EXPECTED[:, :1].expand(1, 3, 32, 32)


def pixels(image) -> torch.Tensor:
    return to_pixels(image, VaeImageProcessor(vae_scale_factor=2), 32)


@pytest.mark.parametrize(
    "image",
    [
        *(Image.fromarray(RGB), RGB, RGB.astype(np.int64), FLOAT, FLOAT.astype(np.float64), FLOAT[None]),
        *(
            TENSOR,
            TENSOR[None],
            torch.tensor(RGB).permute(2, 0, 1),
            torch.tensor(RGB.astype(np.int64)).permute(2, 0, 1),
        ),
        *([TENSOR[None]], (RGB,), [FLOAT]),
    ],
    ids=lambda image: f"{type(image).__name__}-{getattr(image, 'dtype', '')}-{getattr(image, 'shape', '')}",
)
def test_one_image_in_every_layout(image):
    torch.testing.assert_close(pixels(image), EXPECTED)


@pytest.mark.parametrize(
    "image", [GREY, GREY[..., 0], GREY[None], *map(torch.tensor, (GREY[..., 0], GREY[None, ..., 0]))]
)
def test_grey_is_grey_in_all_channels(image):
    torch.testing.assert_close(pixels(image), EXPECTED_GREY)


def test_a_mask_is_black_and_white():
    for image in (RGB > 127, BYTES > 127):
        assert torch.equal(pixels(image), (EXPECTED > 0) * 2.0 - 1)


@pytest.mark.parametrize("image", [[RGB, RGB], np.stack([RGB, RGB]), [FLOAT, TENSOR], torch.stack([TENSOR, TENSOR])])
def test_several_images(image):
    torch.testing.assert_close(pixels(image), EXPECTED.repeat(2, 1, 1, 1))


def test_the_range_that_diffusers_deprecates():
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.testing.assert_close(pixels(2 * FLOAT - 1), EXPECTED)


def test_resampling_that_undershoots_leaves_the_range_and_other_images_alone():
    under, deprecated = FLOAT.copy(), 2 * FLOAT - 1
    under.flat[0] = -0.004
    torch.testing.assert_close(pixels(under)[0, :, 1:], EXPECTED[0, :, 1:])
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.testing.assert_close(pixels([FLOAT, deprecated]), EXPECTED.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.dstack([RGB, GREY]), r"shape \(32, 32, 4\).*1 or 3 channels"),
        (torch.rand(1, 4, 16, 16), r"shape \(1, 4, 16, 16\).*1 or 3 channels"),
        (RGB.transpose(2, 0, 1), r"shape \(3, 32, 32\).*arrays are"),
        (torch.tensor(RGB), r"shape \(32, 32, 3\).*tensors are"),
        (RGB[None, None], "shape"),
        (np.ones(3), "shape"),
        (np.zeros((0, 32, 32, 3)), "shape"),
        (FLOAT + 0j, "complex64"),
        (RGB.astype(np.float32), "from 0.0 to 255.0"),
        (RGB.astype(np.uint16) * 257, "from 0 to 65535"),
        (RGB.astype(np.int16) - 300, "from -300"),
        (FLOAT * np.nan, "nan"),
        ([RGB, RGB[:16]], "2 sizes"),
        ([], "at least one"),
        ([Image.fromarray(RGB), RGB], "PIL images alone"),
        ("photo.png", "holds a str"),
        (None, "holds a NoneType"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        pixels(image)


def test_counterfactuals_take_them():
    pipeline = attach_random_module(make_pipeline())
    noise = pipeline.infer_exogenous_noise(Image.fromarray(RGB), iter(["snow"]))
    torch.testing.assert_close(pipeline.infer_exogenous_noise(RGB, ["snow"]), noise)
    arguments = {"num_inference_steps": 1, "output_type": "np"}
    expected = pipeline.counterfactual(RGB, ["fog"], ["snow"], **arguments).images
    got = pipeline.counterfactual(TENSOR, iter(["fog"]), iter(["snow"]), **arguments).images
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for method in (pipeline.infer_exogenous_noise, pipeline.counterfactual):
        with pytest.raises(ValueError, match="channels"):
            method(RGB.transpose(2, 0, 1))
