"""Image to image, inpainting and ControlNet: stock diffusers denoises, ours gives it the context."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    attach_random_module,
    make_components,
    make_context_module,
    make_pipeline,
    make_unet,
    make_xl_components,
    make_xl_pipeline,
)
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    MultiControlNetModel,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback, SDXLControlnetCFGCutoffCallback
from diffusers.utils import logging

import diffusers_ctx
from diffusers_ctx import ComposableInpaintPipeline, ComposablePipeline
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.adapter_format import AdapterError


logging.disable_progress_bar()

TASKS = ["Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"]
PROMPTS = ["a picture of a circle", "a square"]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CONTROL = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(2, 1, 32, 32)
MASK[:, :, 8:24] = 1.0


def make_controlnet(is_xl: bool = False, **options) -> ControlNetModel:
    torch.manual_seed(4)
    if is_xl:
        options |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8,
        }
    model = ControlNetModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        conditioning_embedding_out_channels=(4, 8),
        **options,
    ).eval()
    for layer in (*model.controlnet_down_blocks, model.controlnet_mid_block):  # which begin at zero
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


def relative_of(task: str, is_xl: bool):
    """The class of ours, and the stock one."""
    kind = "XL" if is_xl else ""
    return getattr(diffusers_ctx, f"Composable{kind}{task}Pipeline"), getattr(
        diffusers, f"StableDiffusion{kind}{task}Pipeline"
    )


def make(cls, is_xl: bool):
    components = make_xl_components() if is_xl else make_components()
    if "ControlNet" in cls.__name__:
        components["controlnet"] = make_controlnet(is_xl)
    options = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    pipeline = cls(**components, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, rows=(0,), **arguments):
    """Denoises in one step, from the images of these rows, their masks and controls, as the pipeline takes them."""
    name, rows = type(pipeline).__name__, list(rows)
    defaults = {"prompt": [PROMPTS[row] for row in rows], "num_inference_steps": 1, "guidance_scale": 3.0}
    defaults |= {"generator": [torch.Generator().manual_seed(row) for row in rows], "output_type": "np"}
    if "Img2Img" in name or "Inpaint" in name:
        defaults |= {"image": PIXELS[rows], "strength": 1.0}
    if "Inpaint" in name:
        defaults |= {"mask_image": MASK[rows], "height": 32, "width": 32}
    if "ControlNet" in name:
        defaults["control_image" if "image" in defaults else "image"] = CONTROL[rows]
    return pipeline(**(defaults | arguments))


def images(pipeline, *args, **arguments) -> np.ndarray:
    return call(pipeline, *args, **arguments).images


@pytest.fixture(params=[(task, is_xl) for task in TASKS for is_xl in (False, True)], ids=str)
def kind(request):
    """How to make the pipeline of ours, and the stock one."""
    task, is_xl = request.param
    return tuple(partial(make, cls, is_xl) for cls in relative_of(task, is_xl))


@pytest.fixture(params=[("Img2Img", True), ("Inpaint", False), ("ControlNet", False), ("ControlNet", True)], ids=str)
def pipeline(request):
    """One of each kind, with an adapter."""
    task, is_xl = request.param
    return attach_random_module(make(relative_of(task, is_xl)[0], is_xl))


# stock diffusers denoises


def test_without_an_adapter_and_unloaded_it_is_the_plain_pipeline(kind, tmp_path):
    ours, expected = kind[0](), images(kind[1]())
    np.testing.assert_array_equal(images(ours), expected)
    adapted = attach_random_module(kind[0]())
    with_snow = images(adapted, interventions=["snow"])
    ours.load_context_adapter(adapted.save_context_adapter(tmp_path))
    np.testing.assert_array_equal(images(ours, interventions=["snow"]), with_snow)
    assert np.abs(with_snow - expected).max() > 1e-3
    ours.unload_context_adapter()
    np.testing.assert_array_equal(images(ours), expected)


def test_it_is_the_stock_pipeline_given_the_tokens(kind):
    """Interventions compose: those of the mask are told, and nothing else."""
    ours, stock, results = attach_random_module(kind[0]()), kind[1](), []
    stock.unet = ours.unet
    for names, mask in ((["snow"], [0.0, 1, 0]), ({"night": 1.0, "fog": 0.5}, [1.0, 0, 0.5])):
        output = call(ours, interventions=names, num_inference_steps=2)
        tokens = ours.context_module(output.exogenous_noise, torch.tensor([mask])).detach()
        embeds = [torch.cat([tokens, tokens])]
        results.append(images(stock, ip_adapter_image_embeds=embeds, num_inference_steps=2))
        np.testing.assert_allclose(output.images, results[-1], atol=1e-5)
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_images_keep_to_their_contexts(pipeline):
    contexts = [["snow"], {"night": 0.5, "fog": 1.0}]
    together = images(pipeline, (0, 1), interventions=contexts)
    for row in (0, 1):
        alone = images(pipeline, (row,), interventions=contexts[row])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_context_guidance_is_the_formula(pipeline):
    """A single step is linear in what the UNet predicts; the contrast is that at the prompt."""

    def one_step(names, guidance, scale=1.0):
        options = {"output_type": "latent", "guidance_scale": guidance}
        return images(pipeline, interventions=names, context_guidance_scale=scale, **options)

    contrast = one_step(["snow"], guidance=1.0) - one_step([], guidance=1.0)
    weakened = one_step(["snow"], 5.0, scale=0.4)
    torch.testing.assert_close(weakened, one_step(["snow"], 5.0) - 0.6 * contrast, atol=1e-5, rtol=1e-4)
    assert contrast.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("task", "is_xl", "callback"),
    [
        ("Img2Img", False, SDCFGCutoffCallback),
        ("Img2Img", True, SDXLCFGCutoffCallback),
        ("ControlNet", True, SDXLControlnetCFGCutoffCallback),
    ],
)
def test_guidance_ends_by_diffusers_callback(task, is_xl, callback):
    pipeline = attach_random_module(make(relative_of(task, is_xl)[0], is_xl))
    arguments = {"num_inference_steps": 3, "interventions": ["snow"]}
    cut = images(pipeline, callback_on_step_end=callback(cutoff_step_ratio=None, cutoff_step_index=0), **arguments)
    assert np.isfinite(cut).all() and np.abs(cut - images(pipeline, **arguments)).max() > 1e-4


def test_mistakes_are_named(pipeline):
    with pytest.raises(ValueError, match=r"rain.*night"):
        call(pipeline, interventions=["rain"])
    with pytest.raises(ValueError, match="same place in the UNet"):
        call(pipeline, ip_adapter_image_embeds=[torch.zeros(2, 1, 32)])
    pipeline.unload_context_adapter()
    with pytest.raises(ValueError, match="load_context_adapter"):
        call(pipeline, interventions=["snow"])


# one from another


@pytest.mark.parametrize(("task", "is_xl"), [("Img2Img", False), ("Inpaint", True), ("ControlNet", False)])
def test_pipelines_are_made_from_one_another(task, is_xl):
    origin = attach_random_module(make_xl_pipeline() if is_xl else make_pipeline())
    cls, stock = relative_of(task, is_xl)
    controlnet = {"controlnet": make_controlnet(is_xl)} if "ControlNet" in task else {}
    expected = images(attach_random_module(make(cls, is_xl)), interventions=["snow"])
    plainly = images(make(stock, is_xl))
    ours = cls.from_pipe(origin, **controlnet)
    plain = stock.from_pipe(origin, **controlnet)
    again = cls.from_pipe(plain)
    for pipeline in (ours, again):
        assert pipeline.unet is origin.unet and pipeline.concepts == origin.concepts
        pipeline.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(images(pipeline, interventions=["snow"]), expected)
    with pytest.raises(ValueError, match=r"ComposableImg2ImgPipeline.from_pipe\(pipe\).*unload_context_adapter\(\)"):
        images(plain)
    back = type(origin).from_pipe(ours)
    assert type(back) is type(origin) and back.unet is origin.unet
    ours.unload_context_adapter()  # for all that share its UNet
    assert origin.context_module is None
    plain.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(images(plain), plainly)


@pytest.mark.parametrize("is_xl", [False, True])
def test_auto_pipelines_stay_with_composing_ones(is_xl):
    origin = make_xl_pipeline() if is_xl else make_pipeline()
    autos = {
        "": AutoPipelineForText2Image,
        "Img2Img": AutoPipelineForImage2Image,
        "Inpaint": AutoPipelineForInpainting,
    }
    controlnet = make_controlnet(is_xl)
    for task, auto in autos.items():
        relative = auto.from_pipe(origin)
        assert type(relative) is relative_of(task, is_xl)[0]
        assert type(AutoPipelineForText2Image.from_pipe(relative)) is type(origin)
        controlled = auto.from_pipe(origin, controlnet=controlnet)
        assert type(controlled) is relative_of(f"ControlNet{task}", is_xl)[0]
        assert type(auto.from_pipe(controlled, controlnet=None)) is type(relative)


def test_of_an_own_subclass_other_tasks_get_ours():
    class Own(ComposablePipeline):
        pass

    own = Own(**make_components(), requires_safety_checker=False)
    assert type(AutoPipelineForText2Image.from_pipe(own)) is Own
    assert type(AutoPipelineForInpainting.from_pipe(own)) is ComposableInpaintPipeline
    assert type(AutoPipelineForText2Image.from_pipe(make_pipeline())) is ComposablePipeline


# counterfactuals


def test_counterfactuals_are_those_of_text_to_image(pipeline):
    origin = attach_random_module(make_xl_pipeline() if "XL" in type(pipeline).__name__ else make_pipeline())
    arguments = {"prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "pt"}
    expected = origin.counterfactual(PIXELS, ["snow"], ["fog"], **arguments)
    got = pipeline.counterfactual(PIXELS, ["snow"], ["fog"], **arguments)
    assert torch.equal(got.images, expected.images) and torch.equal(got.exogenous_noise, expected.exogenous_noise)


# the size of images


def test_images_have_the_size_of_training_or_of_an_image_that_is_given():
    sizes = {}
    for task in TASKS:
        pipeline = make(relative_of(task, False)[0], False)
        attach_context_module(pipeline.unet, make_context_module(posterior_sample_size=12))
        size = {"height": None, "width": None} if "Inpaint" in task else {}
        sizes[task] = images(pipeline, **size).shape[1:3]
    assert sizes == dict.fromkeys(TASKS, (32, 32)) | {"Inpaint": (24, 24)}


@pytest.mark.parametrize("is_xl", [False, True])
def test_latents_to_inpaint_have_their_size(is_xl):
    pipeline = make(relative_of("Inpaint", is_xl)[0], is_xl)
    attach_context_module(pipeline.unet, make_context_module(posterior_sample_size=12))
    latents = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    arguments = {"latents": latents, "height": None, "width": None}
    assert images(pipeline, **arguments).shape == (1, 40, 40, 3)


# ControlNet


@pytest.mark.parametrize(("injection", "is_xl"), [("cross_attention", True), ("prompt", False), ("prompt", True)])
def test_a_controlnet_is_told_the_same_in_every_context(injection, is_xl):
    pipeline = make(relative_of("ControlNet", is_xl)[0], is_xl)
    attach_context_module(pipeline.unet, make_context_module(), injection)
    told, residuals = [], []
    pipeline.controlnet.register_forward_pre_hook(lambda *given: told.append(given[2]), with_kwargs=True)
    pipeline.controlnet.register_forward_hook(lambda module, inputs, made: residuals.append([*made[0], made[1]]))
    results = [images(pipeline, interventions=names) for names in (None, ["snow"])]
    texts = [given["encoder_hidden_states"] for given in told]
    assert torch.equal(*texts) and texts[0].shape == (2, pipeline.tokenizer.model_max_length, 32)
    assert all(map(torch.equal, *residuals)) and residuals[0][-1].any()
    if injection == "prompt":  # whose tokens act at once, and not from zero
        assert np.abs(results[0] - results[1]).max() > 1e-4


def test_a_controlnet_in_guess_mode_and_several_of_them():
    pipeline = attach_random_module(make(relative_of("ControlNet", False)[0], False))
    snow = images(pipeline, interventions=["snow"])
    guessed = images(pipeline, interventions=["snow"], guess_mode=True, context_guidance_scale=2.0)
    assert np.abs(guessed - snow).max() > 1e-3
    both = MultiControlNetModel([pipeline.controlnet, make_controlnet()])
    several = type(pipeline).from_pipe(pipeline, controlnet=both)
    several.set_progress_bar_config(disable=True)
    arguments = {"image": [CONTROL[:1], CONTROL[1:]], "interventions": ["snow"]}
    off = images(several, controlnet_conditioning_scale=[1.0, 0.0], **arguments)
    np.testing.assert_allclose(off, snow, atol=1e-5)
    assert np.abs(images(several, **arguments) - snow).max() > 1e-3


# inpainting


def test_a_unet_that_was_trained_to_inpaint_is_refused(tmp_path):
    folder = attach_random_module(make_pipeline()).save_context_adapter(tmp_path)
    components = make_components() | {"unet": make_unet(cross_attention_dim=32, in_channels=9)}
    pipeline = ComposableInpaintPipeline(**components, requires_safety_checker=False)
    with pytest.raises(AdapterError, match="in_channels is 9, not 4"):
        pipeline.load_context_adapter(folder)
    assert pipeline.context_module is None
