"""What diffusers' own testers ask of a pipeline, of the stock classes as the control and of ours in every state."""

import inspect

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_components, make_xl_components
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_ctx import (
    ComposableImg2ImgPipeline,
    ComposablePipeline,
    ComposableXLImg2ImgPipeline,
    ComposableXLPipeline,
)
from diffusers_ctx.adapter import LORA_ADAPTER


logging.disable_progress_bar()

PROMPTS = ["a picture of a circle", "a square", "a picture of a red triangle and an ellipse, very far away"]
CONTEXTS = [["snow"], [], {"night": 0.5, "fog": 1.0}]
STATES = ["stock", "ours", "adapter", "adapter and LoRA"]
TEXT_LAYERS = ["q_proj", "v_proj"]


def make(is_xl: bool, state: str):
    kind = {
        (False, False): StableDiffusionPipeline,
        (False, True): StableDiffusionXLPipeline,
        (True, False): ComposablePipeline,
        (True, True): ComposableXLPipeline,
    }[state != "stock", is_xl]
    options = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    pipeline = kind(**(make_xl_components() if is_xl else make_components()), **options)
    if "adapter" in state:
        attach_random_module(pipeline)
    if "LoRA" in state:
        add_lora(pipeline.unet, LORA_ADAPTER, ["to_q", "to_v"])
        add_lora(pipeline.text_encoder, LORA_ADAPTER, TEXT_LAYERS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def add_lora(model, name: str, layers: list[str]) -> None:
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=layers), name)


@pytest.fixture(params=[(is_xl, state) for is_xl in (False, True) for state in STATES], ids=str)
def pipeline(request):
    return make(*request.param)


def has_adapter(pipeline) -> bool:
    return getattr(pipeline, "context_module", None) is not None


def is_xl(pipeline) -> bool:
    return isinstance(pipeline, StableDiffusionXLPipeline)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipeline, rows=(0,), **arguments):
    """One guided step for the prompts of these rows, each in its context if there is an adapter."""
    defaults = {"prompt": [PROMPTS[row] for row in rows], "generator": generators(*rows), "guidance_scale": 3.0}
    defaults |= {"num_inference_steps": 1, "output_type": "np"}
    if has_adapter(pipeline):
        defaults |= {"interventions": [CONTEXTS[row] for row in rows]}
    return pipeline(**(defaults | arguments))


def images(pipeline, *args, **arguments) -> np.ndarray:
    return call(pipeline, *args, **arguments).images


def assert_close(got, expected, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=atol)


def saved_and_loaded(pipeline, folder, **options):
    """The pipeline from its files, and its context adapter from its own."""
    pipeline.save_pretrained(folder / "pipeline")
    loaded = type(pipeline).from_pretrained(folder / "pipeline", **options)
    loaded.set_progress_bar_config(disable=True)
    if has_adapter(pipeline):
        loaded.load_context_adapter(pipeline.save_context_adapter(folder / "adapter"))
    return loaded


# the call


@pytest.mark.parametrize("is_xl", [False, True])
def test_without_an_adapter_the_images_are_those_of_the_stock_class(is_xl):
    np.testing.assert_array_equal(images(make(is_xl, "ours"), (0, 2)), images(make(is_xl, "stock"), (0, 2)))


def test_its_arguments_can_be_seen(pipeline):
    stock = StableDiffusionXLPipeline if is_xl(pipeline) else StableDiffusionPipeline
    names = set(inspect.signature(stock.__call__).parameters)
    assert names <= set(inspect.signature(type(pipeline).__call__).parameters)
    assert names - {"self"} <= set(inspect.signature(pipeline.__call__).parameters)


def test_a_batch_holds_what_each_prompt_gives_alone(pipeline):
    together = images(pipeline, (0, 1, 2))
    for row in range(3):
        assert_close(together[row], images(pipeline, (row,))[0])


def test_there_are_as_many_images_as_asked_for(pipeline):
    for rows in ((0,), (0, 1)):
        shape = images(pipeline, rows, generator=None, num_images_per_prompt=2).shape
        assert shape == (2 * len(rows), 32, 32, 3)


def test_guidance_acts(pipeline):
    guided = images(pipeline)
    assert pipeline.do_classifier_free_guidance
    assert np.abs(images(pipeline, guidance_scale=1.0) - guided).max() > 1e-3
    assert not pipeline.do_classifier_free_guidance


def test_tuples_begin_with_the_images(pipeline):
    assert_close(call(pipeline, return_dict=False)[0], images(pipeline), atol=0)


def test_prompts_are_encoded_in_isolation(pipeline):
    expected = images(pipeline)
    encoded = pipeline.encode_prompt(
        PROMPTS[0], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    pipeline.text_encoder = pipeline.tokenizer = None
    if is_xl(pipeline):
        pipeline.text_encoder_2 = pipeline.tokenizer_2 = None
    assert_close(images(pipeline, prompt=None, **dict(zip(names, encoded))), expected, atol=1e-5)


def test_components_make_the_same_pipeline(pipeline):
    other = type(pipeline)(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    np.testing.assert_array_equal(images(other), images(pipeline))


# callbacks


def test_callbacks_are_given_what_they_ask_for(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(set(tensors))
        return {"latents": torch.zeros_like(tensors["latents"])}

    for names in (["latents"], pipeline._callback_tensor_inputs):
        arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        assert not np.asarray(images(pipeline, num_inference_steps=2, output_type="latent", **arguments)).any()
        assert seen[-2:] == [set(names)] * 2


def cut_off(pipeline) -> dict:
    """The callback that diffusers documents for the end of guidance, after the first step."""
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"] if is_xl(pipeline) else ["prompt_embeds"]

    def callback(pipe, index, timestep, tensors):
        if index == 0:
            pipe._guidance_scale = 0.0
            tensors |= {name: tensors[name].chunk(2)[-1] for name in names}
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}


def test_images_keep_to_themselves_when_guidance_ends(pipeline):
    arguments = {"num_inference_steps": 2, "output_type": "latent", **cut_off(pipeline)}
    together = images(pipeline, (0, 2), num_images_per_prompt=2, **arguments | {"generator": generators(*range(4))})
    for seed, row in ((1, 0), (2, 2)):
        alone = images(pipeline, (row,), generator=generators(seed), **arguments)
        assert_close(together[seed], alone[0], atol=1e-3)


def test_diffusers_callback_ends_guidance_of_one_image(pipeline):
    kind = SDXLCFGCutoffCallback if is_xl(pipeline) else SDCFGCutoffCallback
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    callback = kind(cutoff_step_ratio=None, cutoff_step_index=0)
    got = images(pipeline, callback_on_step_end=callback, **arguments)
    assert_close(got, images(pipeline, **arguments, **cut_off(pipeline)), atol=0)


def test_an_interrupted_call_ends_early(pipeline):
    steps = []

    def interrupt(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 0
        return tensors

    images(pipeline, callback_on_step_end=interrupt, num_inference_steps=3)
    assert steps == [0]


# files


def test_saved_and_loaded_it_is_the_same(pipeline, tmp_path):
    loaded = saved_and_loaded(pipeline, tmp_path)
    assert_close(images(loaded), images(pipeline), atol=1e-5)
    assert all(getattr(loaded, name) is None for name in ("image_encoder", "feature_extractor"))


def test_it_loads_in_the_given_data_type(pipeline, tmp_path):
    loaded = saved_and_loaded(pipeline, tmp_path, torch_dtype=torch.bfloat16)
    models = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    base = [p for model in models for name, p in model.named_parameters() if "lora" not in name]  # PEFT keeps its own
    assert {parameter.dtype for parameter in base} == {torch.bfloat16}
    assert np.isfinite(images(loaded)).all()


def test_it_is_saved_in_a_variant(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = type(pipeline).from_pretrained(tmp_path, variant="fp16")
    for name, weight in make(is_xl(pipeline), "stock").unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight)


def test_a_lora_of_the_text_encoder_is_saved_with_it(pipeline, tmp_path):
    if type(pipeline) in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        # which saves no weights beside the LoRA, and refers to where they were loaded from
        pipeline.save_pretrained(tmp_path / "base")
        pipeline = type(pipeline).from_pretrained(tmp_path / "base")
        pipeline.set_progress_bar_config(disable=True)
    before = images(pipeline)
    active = list(getattr(pipeline.text_encoder, "peft_config", {}))  # of an adapter
    add_lora(pipeline.text_encoder, "style", TEXT_LAYERS)
    pipeline.text_encoder.set_adapter([*active, "style"])
    expected = images(pipeline)
    assert np.abs(expected - before).max() > 1e-3
    loaded = saved_and_loaded(pipeline, tmp_path)
    assert_close(images(loaded), expected, atol=1e-4)


# what other pipelines make of it


def test_pipelines_are_made_from_one_another(pipeline):
    plain = StableDiffusionXLPipeline if is_xl(pipeline) else StableDiffusionPipeline
    expected = images(pipeline)
    for back in (
        type(pipeline).from_pipe(plain.from_pipe(pipeline)),
        AutoPipelineForText2Image.from_pipe(pipeline),
    ):
        assert type(back) is type(pipeline) and back.unet is pipeline.unet
        back.set_progress_bar_config(disable=True)
        np.testing.assert_array_equal(images(back), expected)
    img2img = AutoPipelineForImage2Image.from_pipe(pipeline)
    stock, ours = (
        (StableDiffusionXLImg2ImgPipeline, ComposableXLImg2ImgPipeline)
        if is_xl(pipeline)
        else (StableDiffusionImg2ImgPipeline, ComposableImg2ImgPipeline)
    )
    assert type(img2img) is (stock if type(pipeline) is plain else ours)
    assert type(AutoPipelineForText2Image.from_pipe(img2img)) is type(pipeline)
    img2img.set_progress_bar_config(disable=True)
    arguments = {"prompt": PROMPTS[0], "image": expected, "num_inference_steps": 4}
    assert len(img2img(**arguments).images) == 1
    if has_adapter(pipeline):
        unaware = stock.from_pipe(pipeline)
        unaware.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match=r"use `ComposablePipeline`.*or call `unload_context_adapter\(\)` first"):
            unaware(**arguments)
        pipeline.unload_context_adapter()
        assert len(unaware(**arguments).images) == 1


# LoRAs of the user's own


def test_a_lora_is_loaded_weighed_fused_and_unloaded(pipeline, tmp_path):
    expected = images(pipeline)
    trained = make(is_xl(pipeline), "stock")
    add_lora(trained.unet, "style", ["to_k", "to_v"])
    state = get_peft_model_state_dict(trained.unet, adapter_name="style")
    trained.save_lora_weights(tmp_path, unet_lora_layers=state)
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    styled = images(pipeline)
    assert np.abs(styled - expected).max() > 1e-3
    weighed = images(pipeline, cross_attention_kwargs={"scale": 0.5})
    assert np.abs(weighed - styled).max() > 1e-4
    off = images(pipeline, cross_attention_kwargs={"scale": 0.0})
    own = has_adapter(pipeline) and bool(pipeline._context_lora_models)
    # which leaves nothing of an adapter that has a LoRA
    assert_close(off, images(make(is_xl(pipeline), "stock")) if own else expected, atol=1e-4)
    assert_close(images(pipeline), styled, atol=1e-5)
    pipeline.fuse_lora()
    assert_close(images(pipeline), styled)
    pipeline.unfuse_lora()
    assert_close(images(pipeline), styled)
    pipeline.delete_adapters("style")
    assert_close(images(pipeline), expected)
