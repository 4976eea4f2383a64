"""Callbacks that change rows or scales while images with contexts of their own are made."""

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_context_module, make_pipeline, make_xl_pipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback

from diffusers_ctx.adapter import attach_context_module


def in_prompt(pipeline):
    attach_context_module(pipeline.unet, make_context_module(), "prompt")
    return pipeline


@pytest.fixture(params=[attach_random_module, in_prompt])
def pipeline(request):
    return request.param(make_pipeline())


def sample(pipeline, rows=(0, 1), **arguments) -> np.ndarray:
    prompts, contexts = ["a square", "a picture of a circle"], [["snow"], ["night", "fog"]]
    defaults = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
    defaults |= {"interventions": [contexts[row] for row in rows]}
    defaults |= {"generator": [torch.Generator().manual_seed(row) for row in rows]}
    return pipeline([prompts[row] for row in rows], **(defaults | arguments)).images


def steps(change, names=("latents", "prompt_embeds")) -> dict:
    """Arguments with a callback that lets `change` see the pipeline, the step and the tensors."""

    def callback(pipe, step, timestep, tensors):
        change(pipe, step, tensors)
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(names)}


def guidance_ends(pipe, step, tensors) -> None:
    if step == 0:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]


def guidance_begins(pipe, step, tensors) -> None:
    if step == 0:
        pipe._guidance_scale = 3.0
        tensors["prompt_embeds"] = torch.cat([torch.zeros_like(tensors["prompt_embeds"]), tensors["prompt_embeds"]])


@pytest.mark.parametrize(("change", "guidance"), [(guidance_ends, 3.0), (guidance_begins, 1.0)])
@pytest.mark.parametrize("context_guidance", [1.0, 1.5])
def test_contexts_stay_with_their_images(pipeline, change, guidance, context_guidance):
    arguments = {"guidance_scale": guidance, "context_guidance_scale": context_guidance, **steps(change)}
    together = sample(pipeline, **arguments)
    for row in (0, 1):
        np.testing.assert_allclose(together[row], sample(pipeline, (row,), **arguments)[0], atol=1e-4)


def only_first(pipe, step, tensors) -> None:
    tensors["latents"] = tensors["latents"][:1]


def test_contexts_of_fewer_images_are_refused(pipeline):
    with pytest.raises(ValueError, match="latents of 1 images, and 2 are being made"):
        sample(pipeline, **steps(only_first))
    with pytest.raises(ValueError, match=r"1 rows of `prompt_embeds`, and 2 images need 2.*chunk\(2\)\[-1\]"):
        sample(pipeline, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0))


def test_tokens_of_other_images_are_refused():
    unet = attach_random_module(make_pipeline()).unet
    text, tokens = torch.randn(3, 5, 32), torch.randn(2, 5, 1, 32)
    with pytest.raises(ValueError, match="tokens for 2 images, and the UNet is given 3 samples"):
        unet(torch.randn(3, 4, 16, 16), 1, text, added_cond_kwargs={"image_embeds": [tokens]})


def test_tokens_are_repeated_where_arguments_are_positional():
    unet = attach_random_module(make_pipeline()).unet
    text, tokens, x = torch.randn(4, 5, 32), torch.randn(2, 5, 1, 32), torch.randn(4, 4, 16, 16)
    with torch.no_grad():
        expected = unet(x, 1, text, added_cond_kwargs={"image_embeds": [torch.cat([tokens, tokens])]}).sample
        got = unet(x, 1, text, None, None, None, None, {"image_embeds": [tokens]}).sample
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("make", [make_pipeline, make_xl_pipeline])
def test_a_scale_that_a_callback_sets_ends_with_the_call(make):
    pipeline = attach_random_module(make())
    pipeline.set_context_scale(0.5)
    expected = sample(pipeline)
    cut_off = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    halfway = sample(pipeline, callback_on_step_end=cut_off)
    assert np.abs(halfway - expected).max() > 1e-3
    np.testing.assert_array_equal(sample(pipeline), expected)

    def off(pipe, step, tensors):
        pipe.set_context_scale(0.0)

    np.testing.assert_array_equal(sample(pipeline, **steps(off, ["latents"])), halfway)
    np.testing.assert_array_equal(sample(pipeline), expected)


def test_a_scale_that_a_callback_sets_ends_with_a_call_that_fails():
    pipeline = attach_random_module(make_pipeline())
    expected = sample(pipeline)

    def fail(pipe, step, tensors):
        pipe.set_ip_adapter_scale(0.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, **steps(fail, ["latents"]))
    np.testing.assert_array_equal(sample(pipeline), expected)


def test_counterfactuals_take_the_same_callbacks():
    pipeline = attach_random_module(make_pipeline())
    image, arguments = torch.rand(2, 3, 32, 32), {"num_inference_steps": 2, "output_type": "np"}

    def counterfactual(**more) -> np.ndarray:
        return pipeline.counterfactual(image, ["snow"], **arguments, **more).images

    expected = counterfactual()
    cut_off = IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.0)
    assert np.abs(counterfactual(callback_on_step_end=cut_off) - expected).max() > 1e-4
    np.testing.assert_array_equal(counterfactual(), expected)
    with pytest.raises(ValueError, match="given `latents`, and no"):
        counterfactual(callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))
    with pytest.raises(ValueError, match="latents of 1 images"):
        counterfactual(**steps(only_first, ["latents"]))


def test_image_prompts_have_the_scale_of_diffusers_without_a_context_adapter():
    pipeline = make_pipeline()
    pipeline.set_ip_adapter_scale([0.5])  # does nothing, as in diffusers
    attach_random_module(pipeline)
    with pytest.raises(ValueError, match="one number"):
        pipeline.set_ip_adapter_scale({"up": 1.0})
