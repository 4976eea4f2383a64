import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from diffusers_ctx import embedded_base
from diffusers_ctx.data import quad
from diffusers_ctx.evaluation.quad_attributes import (
    PERIODS,
    attribute_difference,
    hue_position,
    read_attributes,
    true_attributes,
)


nan = np.nan
SIZE, COLOR, SHAPE, ORIENTATION = range(4, 8)


@pytest.fixture(scope="module")
def sample():
    return quad.generate((), n=200, seed=quad.FIRST_HELD_OUT_SEED + 5)


@torch.inference_mode()
def decoded(images):
    """What the embedded autoencoder makes of images."""
    vae = AutoencoderKL.from_pretrained(embedded_base(), subfolder="vae", torch_dtype=torch.float32)
    batches = (torch.from_numpy(images[i : i + 50]).permute(0, 3, 1, 2) / 127.5 - 1 for i in range(0, len(images), 50))
    pixels = torch.cat([vae.decode(vae.encode(batch).latent_dist.mode()).sample for batch in batches])
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def plain(hues):
    """A picture of four quadrants without a figure."""
    image = np.empty((64, 64, 3))
    image[32:, :32], image[32:, 32:], image[:32, :32], image[:32, 32:] = quad.hue(np.array(hues))
    return np.rint(image * 255).astype(np.uint8)


def drawn(hues, color, corners=None, ellipse=None, scale=16):
    """A picture that Pillow drew: a polygon of corners (x, y) around the centre, or an upright ellipse's two radii."""
    mask = Image.new("L", (64 * scale, 64 * scale))
    if corners is not None:
        ImageDraw.Draw(mask).polygon([tuple((np.array(corner) + 32) * scale) for corner in corners], fill=255)
    else:
        horizontal, vertical = ellipse
        box = [(32 - horizontal) * scale, (32 - vertical) * scale, (32 + horizontal) * scale, (32 + vertical) * scale]
        ImageDraw.Draw(mask).ellipse(box, fill=255)
    alpha = np.asarray(mask.resize((64, 64), Image.Resampling.BOX))[..., None] / 255
    return np.rint(plain(hues) * (1 - alpha) + quad.hue(np.array(color)) * 255 * alpha).astype(np.uint8)


def polygon(count, radius, turns, first):
    """Corners of a regular polygon; turns run from x to y, that is clockwise, as y points down."""
    angles = 2 * np.pi * (np.arange(count) / count + first + turns)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# the error bounds are some 1.5 times what the docstring of `read_attributes` reports
@pytest.mark.parametrize(
    "look, hues, size, color, misread, orientation",
    [(lambda images: images, 0.0003, 0.0025, 0.002, 0, 0.0006), (decoded, 0.002, 0.007, 0.005, 0.015, 0.0045)],
    ids=["rendered", "decoded"],
)
def test_errors_on_held_out_images(sample, look, hues, size, color, misread, orientation):
    read = read_attributes(look(sample.images))
    error = attribute_difference(read.values, true_attributes(sample.factors))
    mean = np.nanmean(error, axis=0)
    assert (mean[:4] < hues).all()
    assert mean[SIZE] < size
    assert mean[COLOR] < color
    assert np.mean(error[:, SHAPE] > 0) <= misread
    assert mean[ORIENTATION] < orientation
    assert np.isnan(read.values[:, SHAPE]).mean() <= misread
    assert np.median(read.residual) < 0.03


@pytest.mark.parametrize("interventions", [("size", "quad1"), ("orientation", "color", "shape")])
def test_interventional_laws_are_read_as_well(interventions):
    sample = quad.generate(interventions, n=100, seed=quad.FIRST_HELD_OUT_SEED + 6)
    error = attribute_difference(read_attributes(sample.images).values, true_attributes(sample.factors))
    assert (np.nanmean(error, axis=0) < 0.003).all()


HUES = (0.05, 0.3, 0.55, 0.8)


@pytest.mark.parametrize(
    "shape, extent, turns, picture",
    [
        ("circle", 20, nan, {"ellipse": (10, 10)}),
        ("square", 30, 0.07, {"corners": polygon(4, 15 * np.sqrt(2), 0.07, 1 / 8)}),
        ("triangle", 40, 0.25, {"corners": polygon(3, 20, 0.25, -1 / 4)}),
        ("ellipse", 36, 0, {"ellipse": (18, 9)}),
        ("ellipse", 36, 0.25, {"ellipse": (9, 18)}),
    ],
)
def test_figures_that_another_renderer_drew(shape, extent, turns, picture):
    read = read_attributes(drawn(HUES, 0.95, **picture)[None])
    expected = [*HUES, (extent / 48 - 0.2) / 0.8, 0.95, quad.SHAPES.index(shape) / 3, turns]
    error = attribute_difference(read.values[0], np.array(expected))
    np.testing.assert_array_less(np.nan_to_num(error), [0.001] * 4 + [0.015, 0.005, 0.001, 0.003])
    assert np.isnan(error[ORIENTATION]) == (shape == "circle")
    assert read.residual[0] < 0.05


def test_a_quarter_turn_of_the_picture(sample):
    images = sample.images[:64]
    read = read_attributes(images).values
    turned = read_attributes(np.rot90(images, axes=(1, 2))).values  # counterclockwise
    expected = read[:, [2, 0, 3, 1, 4, 5, 6, 7]]  # what was in quad3, upper left, is now in quad1, lower left
    expected[:, ORIENTATION] -= 1 / 4
    assert np.nanmax(attribute_difference(turned, expected)) < 1e-3
    assert np.isnan(turned[:, ORIENTATION]).sum() == (turned[:, SHAPE] == 0).sum()


def test_a_figure_hidden_by_three_quadrants_is_read_off_the_fourth():
    square = polygon(4, 12 * np.sqrt(2), 0.1, 1 / 8)
    read = read_attributes(drawn((0.6, 0.6, 0.2, 0.6), 0.6, corners=square)[None]).values[0]
    assert read[[COLOR, SHAPE]] == pytest.approx([0.6, 1 / 3], abs=0.005)
    assert read[SIZE] == pytest.approx((24 / 48 - 0.2) / 0.8, abs=0.02)
    assert read[ORIENTATION] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("noise", [0, 8])
def test_no_figure_is_unreadable_and_the_quadrants_are_not(noise):
    shift = np.random.default_rng(0).normal(0, noise, (5, 64, 64, 3))
    image = np.clip(plain((0.1, 0.4, 0.5, 0.9)) + shift, 0, 255).astype(np.uint8)
    read = read_attributes(image)
    assert read.values[:, :4] == pytest.approx(np.tile([0.1, 0.4, 0.5, 0.9], (5, 1)), abs=0.02)
    assert np.isnan(read.values[:, 4:]).all()
    assert (read.residual > 0.9).all()


def test_hue_position_is_the_closest_point_of_the_path():
    positions = np.linspace(0, 1, 101)
    found, off = hue_position(quad.hue(positions))
    np.testing.assert_allclose(found, positions, atol=1e-6)
    np.testing.assert_allclose(off, 0, atol=1e-12)
    colors = np.random.default_rng(1).uniform(-0.1, 1.1, (50, 3))
    path = np.linspace(0, 1, 5001)
    squares = ((colors[:, None] - quad.hue(path)) ** 2).sum(-1)
    found, off = hue_position(colors)
    np.testing.assert_allclose(off, squares.min(1), atol=1e-3)
    np.testing.assert_allclose(((colors - quad.hue(found)) ** 2).sum(-1), off, atol=1e-6)


def test_true_attributes_are_what_drives_the_picture():
    factors = np.zeros((4, 8))
    factors[:, SHAPE] = [-3, -0.4, 0.4, 3]  # in [0, 1]: 0.001, 0.34, 0.66, 0.999
    factors[:, ORIENTATION] = 0.674490  # three quarters of a turn
    found = true_attributes(factors)
    np.testing.assert_allclose(found[:, :6], 0.5)
    np.testing.assert_allclose(found[:, SHAPE], [0, 1 / 3, 2 / 3, 1])
    assert np.isnan(found[0, ORIENTATION])
    turned = np.array([[0.75 / PERIODS[name]] for name in ("square", "triangle", "ellipse")])  # 3, 2.25, 1.5 periods
    np.testing.assert_allclose(np.cos(2 * np.pi * (found[1:, 7:] / [[1 / 4], [1 / 3], [1 / 2]] - turned)), 1)
    assert (factors[:, ORIENTATION] == 0.674490).all()


def test_attribute_difference():
    def attributes(shape, orientation, hue=0.5):
        return np.array([hue] * 6 + [shape if np.isnan(shape) else shape / 3, orientation])

    cases = [
        (attributes(1, 0.01), attributes(1, 0.24), 0.02),
        (attributes(1, 0.05), attributes(1, 0.10), 0.05),
        (attributes(2, 0.01), attributes(2, 0.24), 1 / 3 - 0.23),
        (attributes(3, 0.01), attributes(3, 0.24), 0.23),
        (attributes(3, 0.9), attributes(3, 0.4), 0),
        (attributes(0, nan), attributes(0, nan), nan),
        (attributes(1, 0.1), attributes(2, 0.1), nan),
        (attributes(1, 0.1), attributes(nan, nan), nan),
    ]
    a, b, expected = (np.array(column) for column in zip(*cases))
    np.testing.assert_allclose(attribute_difference(a, b)[:, ORIENTATION], expected, atol=1e-12)
    np.testing.assert_array_equal(attribute_difference(a, b), attribute_difference(b, a))
    np.testing.assert_allclose(attribute_difference(a, b)[:, SHAPE], [0] * 6 + [1 / 3, nan])
    assert attribute_difference(attributes(1, 0, hue=0.2), attributes(1, 0, hue=0.9))[0] == pytest.approx(0.7)


def test_bytes_floats_and_no_images_at_all(sample):
    images = sample.images[:70]  # more than are read at once
    read = read_attributes(images)
    for same in (images / 255, (images / 255).astype(np.float32)):
        np.testing.assert_allclose(read_attributes(same).values, read.values, atol=1e-4)
    single = np.concatenate([read_attributes(image[None]).values for image in images[60:]])
    np.testing.assert_allclose(single, read.values[60:], atol=1e-4)
    empty = read_attributes(images[:0])
    assert empty.values.shape == (0, 8)
    assert empty.residual.shape == (0,)


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((64, 64, 3), np.uint8), r"shape \(64, 64, 3\)"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"shape \(2, 32, 32, 3\)"),
        (np.zeros((2, 64, 64, 3), int), "type int64"),
    ],
)
def test_arrays_that_are_no_images_of_quad(images, message):
    with pytest.raises(ValueError, match=message):
        read_attributes(images)
