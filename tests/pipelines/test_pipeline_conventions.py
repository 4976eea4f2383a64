"""What users of diffusers expect of every pipeline, of ComposablePipeline without and with a context adapter."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import attach_random_module, make_pipeline, make_xl_pipeline
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, schedulers
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from diffusers.utils import is_xformers_available
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter import LORA_ADAPTER, attach_context_module
from diffusers_ctx.pipelines import ComposablePipelineOutput


PROMPTS = ["a picture of a circle", "a square", "a picture of a red triangle and an ellipse, very far away"]


@pytest.fixture(params=[False, True], ids=["plain", "adapted"])
def pipeline(request) -> ComposablePipeline:
    return attach_random_module(make_pipeline()) if request.param else make_pipeline()


@pytest.fixture
def adapted() -> ComposablePipeline:
    return attach_random_module(make_pipeline())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(pipeline, prompt=PROMPTS[0], **arguments):
    """Two steps under both kinds of guidance, with an intervention if there is an adapter to take it."""
    defaults = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np", "generator": generators(0)[0]}
    if getattr(pipeline, "context_module", None) is not None:
        defaults |= {"interventions": ["snow"], "context_guidance_scale": 1.5}
    return pipeline(prompt, **(defaults | arguments))


def images(pipeline, *args, **arguments) -> np.ndarray:
    return call(pipeline, *args, **arguments).images


def add_lora(pipeline, name: str) -> None:
    config = LoraConfig(
        r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    pipeline.unet.add_adapter(config, name)


def attach_image_prompts(unet) -> list[torch.Tensor]:
    """Loads a random IP-Adapter the way `load_ip_adapter` does, and makes embeddings of an image for it."""
    width = unet.config.cross_attention_dim
    layers = {}
    for index, name in enumerate(name for name in unet.attn_processors if "attn2" in name):
        hidden_size = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        weights = IPAdapterAttnProcessor2_0(hidden_size, width).state_dict()
        layers |= {f"{2 * index + 1}.{key.replace('.0', '')}": weight for key, weight in weights.items()}
    projection = ImageProjection(width, width, num_image_text_embeds=4).state_dict()
    projection = {key.replace("image_embeds", "proj"): weight for key, weight in projection.items()}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return [torch.randn(2, 1, width)]


# saving and loading


def test_saved_and_loaded_it_is_the_same(pipeline, tmp_path):
    expected = images(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = ComposablePipeline.from_pretrained(tmp_path / "pipeline")
    if pipeline.context_module is not None:
        loaded.load_context_adapter(pipeline.save_context_adapter(tmp_path / "adapter"))
    np.testing.assert_allclose(images(loaded), expected, atol=1e-5)
    for name in pipeline._optional_components:
        assert getattr(loaded, name) is None
    assert json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["requires_safety_checker"] is False


def test_it_loads_in_the_given_data_type_and_variant(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    loaded = ComposablePipeline.from_pretrained(tmp_path / "pipeline", variant="fp16", torch_dtype=torch.bfloat16)
    if pipeline.context_module is not None:
        loaded.load_context_adapter(pipeline.save_context_adapter(tmp_path / "adapter"))
    models = [component for component in loaded.components.values() if isinstance(component, torch.nn.Module)]
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.bfloat16}
    assert np.isfinite(images(loaded)).all()


# outputs


@pytest.mark.parametrize("make", [make_pipeline, make_xl_pipeline])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_tuples_are_of_images_and_exogenous_noise(make, has_adapter):
    pipeline = attach_random_module(make()) if has_adapter else make()
    output, values = call(pipeline), call(pipeline, return_dict=False)
    assert type(output) is ComposablePipelineOutput and type(values) is tuple
    images, noise = values
    np.testing.assert_array_equal(images, output.images)
    assert output.nsfw_content_detected is None
    if not has_adapter:
        assert noise is None and output.exogenous_noise is None
        return
    assert torch.equal(noise, output.exogenous_noise) and len(noise) == 1
    options = {"num_inference_steps": 1, "output_type": "pt"}
    output = pipeline.counterfactual(images, ["snow"], **options)
    images, noise = pipeline.counterfactual(images, ["snow"], return_dict=False, **options)
    assert type(output) is ComposablePipelineOutput and output.nsfw_content_detected is None
    assert torch.equal(images, output.images) and torch.equal(noise, output.exogenous_noise)


def test_output_types_agree(pipeline):
    arrays, tensors, pictures = (images(pipeline, output_type=kind) for kind in ("np", "pt", "pil"))
    np.testing.assert_allclose(tensors.permute(0, 2, 3, 1), arrays, atol=1e-5)
    np.testing.assert_allclose(np.asarray(pictures[0]) / 255, arrays[0], atol=1 / 255)
    latents = images(pipeline, output_type="latent")
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    np.testing.assert_allclose(pipeline.image_processor.postprocess(decoded.detach(), "np"), arrays, atol=1e-5)


def test_a_batch_holds_what_each_prompt_gives_alone(pipeline):
    together = images(pipeline, PROMPTS, generator=generators(0, 1, 2))
    for row, prompt in enumerate(PROMPTS):
        alone = images(pipeline, prompt, generator=generators(row))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_images_of_a_prompt_follow_one_another(pipeline):
    """Each with the noise of its own generator and, with an adapter, the interventions of its prompt."""
    contexts = [None, None] if pipeline.context_module is None else [["night"], {"fog": 0.5}]
    arguments = {"num_images_per_prompt": 2, "interventions": contexts if any(contexts) else None}
    together = images(pipeline, PROMPTS[:2], generator=generators(*range(4)), **arguments)
    assert len(together) == 4
    for row in range(4):
        prompt, context = PROMPTS[row // 2], contexts[row // 2]
        alone = images(pipeline, prompt, generator=generators(row), interventions=context)
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_embedded_prompts_give_what_prompts_do(pipeline):
    embeds, negative = pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, True)
    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "generator": generators(0, 1)}
    expected = images(pipeline, PROMPTS[:2], generator=generators(0, 1))
    np.testing.assert_allclose(images(pipeline, None, **arguments), expected, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler"]
)
def test_any_scheduler_samples(pipeline, name):
    pipeline.scheduler = getattr(schedulers, name).from_config(pipeline.scheduler.config)
    result = images(pipeline, num_inference_steps=3)
    assert result.shape == (1, 32, 32, 3) and np.isfinite(result).all()


# callbacks


def test_callbacks_see_and_change_what_is_denoised(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(set(tensors))
        pipe._guidance_scale += 1.0
        return {"latents": torch.zeros_like(tensors["latents"])}

    names = pipeline._callback_tensor_inputs
    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    assert not images(pipeline, output_type="latent", **arguments).any()
    assert seen == [set(names)] * 2
    assert pipeline.guidance_scale == 3.0 + pipeline.num_timesteps


def test_an_interrupted_call_ends_with_the_latents_so_far(pipeline):
    states = []

    def collect(pipe, step, timestep, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    finished = images(pipeline, callback_on_step_end=collect, **arguments)
    interrupted = images(pipeline, callback_on_step_end=interrupt, **arguments)
    torch.testing.assert_close(interrupted, states[1])
    torch.testing.assert_close(images(pipeline, **arguments), finished)


# where weights lie


def test_offloaded_models_give_the_same(pipeline):
    expected = images(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)
    pipeline.remove_all_hooks()
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)


@pytest.mark.parametrize(
    "groups", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_weights_on_disk_are_not_taken_for_what_is_left_in_memory(pipeline, groups, tmp_path):
    pipeline.enable_group_offload(onload_device=torch.device("cpu"), offload_to_disk_path=str(tmp_path), **groups)
    if pipeline.context_module is None:
        assert images(pipeline).shape
        return
    with pytest.raises(ValueError, match="without `offload_to_disk_path`"):
        images(pipeline)
    with pytest.raises(ValueError, match="without `offload_to_disk_path`"):
        pipeline.save_context_adapter(tmp_path / "adapter")


def test_a_unet_offloaded_layer_by_layer_gives_the_same(pipeline):
    """What `enable_sequential_cpu_offload` does to it; Accelerate cannot do it to the text encoder of this version."""
    expected = images(pipeline)
    embeds, negative = pipeline.encode_prompt(PROMPTS[0], "cpu", 1, True)
    if pipeline.context_module is not None:
        image = torch.rand(1, 3, 32, 32, generator=generators(0)[0])
        noise = pipeline.infer_exogenous_noise(image, ["fog"])
    cpu_offload(pipeline.unet, "cpu")
    got = images(pipeline, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    if pipeline.context_module is not None:
        torch.testing.assert_close(pipeline.infer_exogenous_noise(image, ["fog"]), noise)
    assert pipeline.unet.device.type == "meta"


# other pipelines of the same components


def test_pipelines_are_made_from_one_another(pipeline):
    expected = images(pipeline)
    stock = StableDiffusionPipeline.from_pipe(pipeline)
    back = ComposablePipeline.from_pipe(stock)
    assert back.unet is stock.unet is pipeline.unet
    assert back.concepts == pipeline.concepts
    np.testing.assert_array_equal(images(back), expected)


def test_context_tokens_reach_other_pipelines_as_image_prompts(adapted):
    """A pipeline that knows nothing of interventions takes their tokens; unloaded, it is as it always was."""
    output = call(adapted, context_guidance_scale=1.0)
    mask = torch.tensor([[0.0, 1, 0]])
    tokens = adapted.context_module(output.exogenous_noise, mask).detach()
    embeds = {"ip_adapter_image_embeds": [torch.cat([tokens, tokens])]}
    stock = StableDiffusionPipeline.from_pipe(adapted)
    with pytest.raises(ValueError, match=r"use `ComposablePipeline`.*or call `unload_context_adapter\(\)` first"):
        images(stock)
    np.testing.assert_allclose(images(stock, **embeds), output.images, atol=1e-5)
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(adapted)
    assert image_to_image(PROMPTS[0], image=output.images, num_inference_steps=4, **embeds).images
    adapted.unload_context_adapter()
    np.testing.assert_array_equal(images(stock), images(make_pipeline()))


# what changes the attention or the autoencoder


def test_the_autoencoder_works_in_slices_and_tiles(pipeline):
    expected = images(pipeline, PROMPTS, generator=generators(0, 1, 2))
    pipeline.vae.enable_slicing()
    np.testing.assert_allclose(images(pipeline, PROMPTS, generator=generators(0, 1, 2)), expected, atol=1e-4)
    pipeline.vae.enable_tiling()
    assert images(pipeline, PROMPTS, generator=generators(0, 1, 2)).shape == expected.shape


def test_freeu_comes_and_goes(pipeline):
    expected = images(pipeline)
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert np.abs(images(pipeline) - expected).max() > 1e-3
    pipeline.disable_freeu()
    np.testing.assert_array_equal(images(pipeline), expected)


def test_sliced_attention_works_or_says_that_it_does_not(pipeline, tmp_path):
    expected = images(pipeline)
    has_adapter = pipeline.context_module is not None
    if has_adapter:
        folder = pipeline.save_context_adapter(tmp_path / "adapter")
    pipeline.enable_attention_slicing(1)
    if has_adapter:
        with pytest.raises(RuntimeError, match=r"attention slicing.*load_context_adapter"):
            images(pipeline)
        pipeline.unload_context_adapter()
        pipeline.load_context_adapter(folder)
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-4)


def test_fused_projections_work_or_say_that_they_do_not(pipeline):
    expected = images(pipeline)
    has_adapter = pipeline.context_module is not None
    pipeline.fuse_qkv_projections()
    if has_adapter:
        with pytest.raises(RuntimeError, match="unfuse_qkv_projections"):
            images(pipeline)
    else:
        np.testing.assert_allclose(images(pipeline), expected, atol=1e-4)
    pipeline.unfuse_qkv_projections()
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available() and is_xformers_available(), reason="xformers works here")
def test_xformers_says_that_it_is_missing_and_changes_nothing(pipeline):
    expected = images(pipeline)
    with pytest.raises((ModuleNotFoundError, ValueError), match=r"xformers|cuda"):
        pipeline.enable_xformers_memory_efficient_attention()
    np.testing.assert_array_equal(images(pipeline), expected)


@pytest.mark.skipif(not (torch.cuda.is_available() and is_xformers_available()), reason="needs a GPU and xformers")
def test_xformers_gives_the_same(pipeline):
    pipeline.to("cuda")
    expected = images(pipeline)
    pipeline.enable_xformers_memory_efficient_attention()
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-3)
    pipeline.disable_xformers_memory_efficient_attention()
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-3)


def test_an_ip_adapter_and_a_context_adapter_exclude_each_other(adapted, plain_pipeline, context_module):
    expected = images(adapted)
    with pytest.raises(ValueError, match="unload_context_adapter"):
        adapted.load_ip_adapter({}, subfolder="", weight_name="")
    np.testing.assert_array_equal(images(adapted), expected)
    image_prompts = attach_image_prompts(plain_pipeline.unet)
    with pytest.raises(ValueError, match=r"has an IP-Adapter; call `unload_ip_adapter"):
        attach_context_module(plain_pipeline.unet, context_module)
    assert np.isfinite(images(plain_pipeline, ip_adapter_image_embeds=image_prompts)).all()
    plain_pipeline.unload_ip_adapter()
    np.testing.assert_array_equal(images(plain_pipeline), images(make_pipeline()))
    with pytest.raises(ValueError, match=r"has a context adapter; call `unload_context_adapter"):
        attach_context_module(adapted.unet, context_module)


def test_a_context_adapter_is_not_unloaded_as_an_ip_adapter(adapted):
    add_lora(adapted, LORA_ADAPTER)
    expected = images(adapted)
    with pytest.raises(ValueError, match=r"call `unload_context_adapter\(\)` first"):
        adapted.unload_ip_adapter()
    np.testing.assert_array_equal(images(adapted), expected)
    adapted.unload_context_adapter()
    assert adapted.context_module is None and not adapted.get_active_adapters()
    np.testing.assert_array_equal(images(adapted), images(make_pipeline()))


# LoRA beside the adapter


def test_loras_are_set_fused_and_unloaded(pipeline):
    expected = images(pipeline)
    torch.manual_seed(3)
    add_lora(pipeline, "one")
    add_lora(pipeline, "two")
    outputs = []
    for names, weights in ((["one"], [1.0]), (["two"], [1.0]), (["one", "two"], [0.5, 0.7])):
        pipeline.set_adapters(names, weights)
        outputs.append(images(pipeline))
    for one, other in combinations([expected, *outputs], 2):
        assert np.abs(one - other).max() > 1e-3
    pipeline.fuse_lora()
    np.testing.assert_allclose(images(pipeline), outputs[2], atol=1e-4)
    pipeline.unfuse_lora()
    np.testing.assert_allclose(images(pipeline), outputs[2], atol=1e-4)
    pipeline.disable_lora()
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-4)
    pipeline.unload_lora_weights()
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-4)


def test_a_lora_is_saved_and_loaded_beside_the_adapter(pipeline, tmp_path):
    torch.manual_seed(3)
    add_lora(pipeline, "default")
    expected = images(pipeline)
    pipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path)
    np.testing.assert_allclose(images(pipeline), expected, atol=1e-5)
