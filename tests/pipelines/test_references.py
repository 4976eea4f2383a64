"""Concepts take their values from reference images, and sweeps vary interventions alone."""

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_context_module, make_pipeline, make_xl_pipeline
from PIL import Image

from diffusers_ctx import ComposableImg2ImgPipeline, ComposableInpaintPipeline
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.context import intervention_mask


PROMPT = "a picture of a circle"
SNOW, FOG = 1, 2  # nodes
REFERENCE, OTHER, IMAGE = (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2))


@pytest.fixture
def pipeline():
    return attach_random_module(make_pipeline())


def sample(pipeline, prompt=PROMPT, **arguments):
    defaults = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline(prompt, **(defaults | arguments))


def values(pipeline, noise, *rows) -> torch.Tensor:
    """Node values of exogenous noise under interventions."""
    mask = intervention_mask(list(rows), pipeline.concepts, len(noise))
    return pipeline.context_module.concept_values(noise, mask).detach()


def read(pipeline, image) -> torch.Tensor:
    """Node values that the posterior reads off an image."""
    latents = pipeline.vae.encode(2 * image[None] - 1).latent_dist.mode() * pipeline.vae.config.scaling_factor
    return pipeline.context_module.read_values(latents)[0].detach()


def test_a_concept_has_the_value_of_its_reference(pipeline):
    plain = sample(pipeline, interventions=["snow", "fog"])
    output = sample(pipeline, interventions={"snow": REFERENCE, "fog": 1.0})
    got = values(pipeline, output.exogenous_noise, ["snow", "fog"])[0]
    torch.testing.assert_close(got[SNOW], read(pipeline, REFERENCE)[SNOW], atol=1e-4, rtol=1e-4)
    others = [0, 2, 3, 4]
    assert torch.equal(output.exogenous_noise[0, others], plain.exogenous_noise[0, others])
    assert np.abs(output.images - plain.images).max() > 1e-4
    again = sample(pipeline, interventions=["fog", "snow"], exogenous_noise=output.exogenous_noise)
    np.testing.assert_array_equal(again.images, output.images)


def test_each_prompt_has_references_of_its_own(pipeline):
    contexts = [{"snow": REFERENCE, "fog": REFERENCE}, ["night"], {"snow": OTHER, "night": 0.5}]
    output = sample(pipeline, [PROMPT] * 3, interventions=contexts, num_images_per_prompt=2)
    plain = sample(pipeline, [PROMPT] * 3, num_images_per_prompt=2).exogenous_noise
    got = values(pipeline, output.exogenous_noise, *([["snow", "fog"]] * 2 + [["night"]] * 2 + [["snow"]] * 2))
    for row in (0, 1):
        nodes = [SNOW, FOG]
        torch.testing.assert_close(got[row, nodes], read(pipeline, REFERENCE)[nodes], atol=1e-4, rtol=1e-4)
    assert torch.equal(output.exogenous_noise[2:4], plain[2:4])
    for row in (4, 5):
        torch.testing.assert_close(got[row, SNOW], read(pipeline, OTHER)[SNOW], atol=1e-4, rtol=1e-4)


def test_references_come_in_every_layout(pipeline):
    pixels = (REFERENCE.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    noises = [
        sample(pipeline, interventions={"snow": image}).exogenous_noise
        for image in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None])
    ]
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], atol=1e-4, rtol=1e-4)


def test_noise_that_is_given_is_left_alone(pipeline):
    noise = torch.zeros(1, 5, 4)
    output = sample(pipeline, interventions={"snow": REFERENCE}, exogenous_noise=noise)
    assert not noise.any() and output.exogenous_noise[0, SNOW].any()
    assert not output.exogenous_noise[0, [0, 2, 3, 4]].any()


@pytest.mark.parametrize("make", [make_pipeline, make_xl_pipeline])
def test_counterfactuals_take_references(make):
    pipeline = attach_random_module(make())
    options = {"num_inference_steps": 1, "output_type": "pt"}
    plain = pipeline.counterfactual(IMAGE, ["snow"], ["fog"], **options)
    output = pipeline.counterfactual(IMAGE, {"snow": REFERENCE}, ["fog"], **options)
    got = values(pipeline, output.exogenous_noise, ["snow"])[0]
    torch.testing.assert_close(got[SNOW], read(pipeline, REFERENCE)[SNOW], atol=1e-4, rtol=1e-4)
    assert torch.equal(output.exogenous_noise[0, [0, 2, 3, 4]], plain.exogenous_noise[0, [0, 2, 3, 4]])
    assert (output.images - plain.images).abs().max() > 1e-4
    itself = pipeline.counterfactual(IMAGE, {"snow": IMAGE}, ["snow"], **options)  # its own value changes nothing
    torch.testing.assert_close(
        itself.images, pipeline.counterfactual(IMAGE, ["snow"], ["snow"], **options).images, atol=1e-4, rtol=1e-4
    )


def test_mistakes_are_named(pipeline):
    with pytest.raises(ValueError, match=r"Unknown concepts \['rain'\]"):
        sample(pipeline, interventions={"rain": REFERENCE})
    with pytest.raises(ValueError, match=r"reference image of \['snow'\] holds 2 images; give one"):
        sample(pipeline, interventions={"snow": torch.stack([REFERENCE, OTHER])})
    with pytest.raises(ValueError, match="strengths are numbers"):
        pipeline.counterfactual(IMAGE, [], {"snow": REFERENCE})
    pipeline.context_module.leave_out_noise(["snow"])
    with pytest.raises(ValueError, match=r"\['snow'\] have no exogenous noise"):
        sample(pipeline, interventions={"snow": REFERENCE})
    pipeline.unload_context_adapter()
    with pytest.raises(ValueError, match="load_context_adapter"):
        sample(pipeline, interventions={"snow": REFERENCE})


# sweeps


def test_a_sweep_is_one_call_for_each_set(pipeline):
    sets = [[], {"snow": 0.5}, ["snow"], {"snow": REFERENCE}]
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": 3.0, "negative_prompt": "a square", "num_inference_steps": 1, "output_type": "np"}
    strip = pipeline.sweep(PROMPT, sets, generator=generator, **options)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    assert strip.images.shape == (4, 32, 32, 3)
    for image, noise, interventions in zip(strip.images, strip.exogenous_noise, sets):
        alone = sample(pipeline, interventions=interventions, **options)
        np.testing.assert_allclose(image, alone.images[0], atol=1e-4)
        assert torch.equal(noise, alone.exogenous_noise[0])
    for one, other in ((0, 1), (1, 2), (2, 3)):
        assert np.abs(strip.images[one] - strip.images[other]).max() > 1e-4
    torch.manual_seed(0)
    drawn = pipeline.sweep(PROMPT, sets[:2], **options)
    assert torch.equal(drawn.exogenous_noise[0], drawn.exogenous_noise[1])
    assert not torch.equal(drawn.exogenous_noise[0], pipeline.sweep(PROMPT, sets[:2], **options).exogenous_noise[0])


@pytest.mark.parametrize("cls", [ComposableImg2ImgPipeline, ComposableInpaintPipeline])
def test_relatives_sweep_over_one_image(pipeline, cls):
    relative = cls.from_pipe(pipeline)
    relative.set_progress_bar_config(disable=True)
    picture, mask = Image.fromarray(np.uint8(IMAGE.permute(1, 2, 0).numpy() * 255)), Image.new("L", (32, 32), 255)
    options = {"image": picture, "strength": 1.0, "num_inference_steps": 1, "output_type": "np"}
    options |= {"mask_image": mask} if cls is ComposableInpaintPipeline else {}
    same = relative.sweep(PROMPT, [["snow"], ["snow"], ["fog"]], **options).images
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)
    assert np.abs(same[0] - same[2]).max() > 1e-4


def test_a_sweep_is_of_several_sets_and_one_prompt(pipeline):
    for interventions in ([], ["snow"]):
        with pytest.raises(ValueError, match="lists a set for each image"):
            pipeline.sweep(PROMPT, interventions)
    with pytest.raises(ValueError, match="one prompt and one generator"):
        pipeline.sweep([PROMPT], [[], ["snow"]])


def test_of_one_image_several_counterfactuals_are_made():
    pipeline = make_pipeline()
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    options = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt"}
    sets = [["snow"], {"fog": 0.5}, {"snow": REFERENCE}]
    strip = pipeline.counterfactual(IMAGE, sets, ["night"], **options)
    for image, noise, interventions in zip(strip.images, strip.exogenous_noise, sets):
        alone = pipeline.counterfactual(IMAGE, interventions, ["night"], **options)
        torch.testing.assert_close(image, alone.images[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(noise, alone.exogenous_noise[0])
    with pytest.raises(ValueError, match="3 entries for 2"):
        pipeline.counterfactual(torch.stack([IMAGE, OTHER]), sets)
