"""Counterfactuals that are guided, weighed, and confined by a mask."""

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline, make_xl_pipeline
from PIL import Image

from diffusers_ctx.pipelines.edit import OnPath


PROMPT = "a picture of a circle"
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 32, 32)
MASK[:, 8:20, 10:] = 1.0


@pytest.fixture
def pipeline():
    return attach_random_module(make_pipeline())


def edit(pipeline, interventions=("snow",), image=IMAGES, **arguments):
    defaults = {"prompt": PROMPT, "num_inference_steps": 3, "output_type": "pt", "factual_interventions": ["fog"]}
    return pipeline.counterfactual(image, list(interventions), **(defaults | arguments)).images


# guidance


@pytest.mark.parametrize("make", [make_pipeline, make_xl_pipeline])
def test_however_strong_the_guidance_no_change_gives_the_image_back(make):
    """Also of a model so rough that inversion under guidance would not converge."""
    pipeline = attach_random_module(make())
    latents = pipeline._encode_images(2 * IMAGES - 1)
    options = {"guidance_scale": 7.5, "negative_prompt": "a square", "output_type": "latent"}
    back, changed = edit(pipeline, ["fog"], **options), edit(pipeline, ["snow"], **options)
    assert (back - latents).abs().max() < 1e-3 * latents.abs().max()
    assert (changed - latents).abs().max() > 1e-2 * latents.abs().max()
    assert (changed - edit(pipeline, ["snow"], output_type="latent")).abs().max() > 1e-3


def test_counterfactuals_add_scores_too(pipeline):
    options = {"factual_interventions": ["fog", "snow"], "output_type": "latent"}
    latents = pipeline._encode_images(2 * IMAGES - 1)
    back = edit(pipeline, ["fog", "snow"], add_scores=True, guidance_scale=3.0, **options)
    assert (back - latents).abs().max() < 1e-3 * latents.abs().max()
    for guidance_scale in (1.0, 3.0):
        added, apart = (
            edit(pipeline, ["fog", "night"], add_scores=adds, guidance_scale=guidance_scale, **options)
            for adds in (True, False)
        )
        assert (added - apart).abs().max() > 1e-4 * latents.abs().max()


def test_guided_callbacks_see_the_counterfactual_alone(pipeline):
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    got = edit(pipeline, guidance_scale=3.0, output_type="latent", callback_on_step_end=watch)
    assert [len(latents) for latents in seen] == [2, 2, 2] and torch.equal(seen[-1], got)


def test_what_the_factual_sample_misses_of_the_path_is_added_to_both():
    path = [torch.full((1, 4, 2, 2), float(step)) for step in range(3)]
    on_step = OnPath(path, lambda step, timestep, sample: sample, is_led=True)
    factual, sample = torch.full((1, 4, 2, 2), 0.7), torch.full((1, 4, 2, 2), 1.5)
    got = on_step(0, 999, torch.cat([factual, sample]))
    torch.testing.assert_close(got, torch.cat([path[1], torch.full((1, 4, 2, 2), 1.8)]))


# the dial


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_contrast_of_a_step_is_scaled(pipeline, guidance_scale):
    """A single step is linear in the prediction: from the image at 0 to the counterfactual at 1, and beyond."""
    options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": guidance_scale}
    none, half, full, more = (edit(pipeline, context_guidance_scale=scale, **options) for scale in (0, 0.5, 1, 2))
    torch.testing.assert_close(half, (none + full) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(more, 2 * full - none, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(none, edit(pipeline, ["fog"], **options), atol=1e-4, rtol=1e-4)


# the mask


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_what_the_mask_keeps_is_kept_to_the_pixel(pipeline, guidance_scale):
    whole = edit(pipeline, guidance_scale=guidance_scale)
    masked = edit(pipeline, guidance_scale=guidance_scale, mask_image=MASK)
    kept = (MASK == 0).expand(2, 3, 32, 32)
    assert torch.equal(masked[kept], IMAGES[kept])
    assert (masked - IMAGES)[~kept].abs().max() > 1e-2
    everywhere = edit(pipeline, guidance_scale=guidance_scale, mask_image=torch.ones_like(MASK))
    torch.testing.assert_close(everywhere, whole)


def test_pictures_are_kept_to_the_byte_and_grey_mixes(pipeline):
    pixels = np.uint8(IMAGES.permute(0, 2, 3, 1).numpy() * 255)
    pictures = [Image.fromarray(image) for image in pixels]
    mask = Image.fromarray(np.uint8(MASK[0].numpy() * 255))
    masked = edit(pipeline, image=pictures, mask_image=mask, output_type="pil")
    kept = MASK[0].numpy() == 0
    for image, before in zip(masked, pixels):
        np.testing.assert_array_equal(np.asarray(image)[kept], before[kept])
    grey = edit(pipeline, mask_image=torch.full_like(MASK, 0.25))
    torch.testing.assert_close(grey, 0.75 * IMAGES + 0.25 * edit(pipeline), atol=1e-5, rtol=1e-4)


def test_each_image_may_have_a_mask(pipeline):
    together = edit(pipeline, mask_image=torch.stack([MASK, 1 - MASK]))
    for row, mask in enumerate((MASK, 1 - MASK)):
        alone = edit(pipeline, image=IMAGES[row : row + 1], mask_image=mask)
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_latents_outside_of_the_mask_are_those_of_the_image(pipeline):
    latents = pipeline._encode_images(2 * IMAGES - 1)
    masked = edit(pipeline, mask_image=MASK, output_type="latent")
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[4:10, 5:] = False
    assert torch.equal(masked[..., outside], latents[..., outside])
    assert (masked - latents)[..., ~outside].abs().max() > 1e-2


def test_masks_of_other_sizes_and_numbers_are_named(pipeline):
    for mask in (torch.ones(1, 16, 16), torch.ones(3, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"`mask_image` is \d of height and width .*for 2 images of \(32, 32\)"):
            edit(pipeline, mask_image=mask)
