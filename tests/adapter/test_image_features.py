"""What a posterior can see of images: features of the base model's UNet, or of CLIP."""

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from conftest import SDXL_UNET, attach_random_module, make_context_module, make_pipeline, make_unet, make_xl_pipeline
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from diffusers_ctx import embedded_base
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.adapter.image_features import BackboneFeatures, ClipFeatures
from diffusers_ctx.pipelines import Conditioner


CLIP = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "patch_size": 4}
IMAGE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def add_lora(model, name: str, targets: list[str]) -> None:
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets), name)


def add_loras(pipeline) -> None:
    for name in ("context", "style"):
        add_lora(pipeline.unet, name, ["to_q", "to_v"])
        add_lora(pipeline.text_encoder, name, ["q_proj", "v_proj"])


def unet_features(pipeline) -> torch.Tensor:
    return Conditioner.of(pipeline).backbone_features()(IMAGE, LATENTS)


def sample(pipeline) -> np.ndarray:
    arguments = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 1, "output_type": "np"}
    return pipeline("a circle", interventions=["snow"], **arguments).images


# the UNet


@torch.no_grad()
def test_they_come_out_of_the_middle_block_of_clean_latents_without_a_prompt(plain_pipeline):
    unet = plain_pipeline.unet
    text, _ = plain_pipeline.encode_prompt([""] * 2, "cpu", 1, False)
    time = unet.time_embedding(unet.time_proj(torch.zeros(2)))
    hidden = unet.conv_in(LATENTS)
    for block in unet.down_blocks:
        told = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        hidden, _ = block(hidden, time, **told)
    expected = unet.mid_block(hidden, time, encoder_hidden_states=text)
    features = unet_features(plain_pipeline)
    assert features.shape == (2, 16, 8, 8)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("injection", ["cross_attention", "prompt"])
def test_they_are_the_base_models_whatever_was_loaded_since(injection):
    expected = unet_features(make_pipeline())
    pipeline = make_pipeline()
    if injection == "prompt":
        attach_context_module(pipeline.unet, make_context_module(), injection)
    else:
        attach_random_module(pipeline)
    add_loras(pipeline)
    before = sample(pipeline)
    assert torch.equal(unet_features(pipeline), expected)
    np.testing.assert_array_equal(sample(pipeline), before)  # all are back
    assert not pipeline.unet.mid_block._forward_hooks


def test_fused_loras_are_refused(plain_pipeline):
    attach_random_module(plain_pipeline)
    add_loras(plain_pipeline)
    expected = unet_features(plain_pipeline)
    plain_pipeline.fuse_lora()
    with pytest.raises(ValueError, match=r"call `unfuse_lora\(\)` first"):
        unet_features(plain_pipeline)
    plain_pipeline.unfuse_lora()
    torch.testing.assert_close(unet_features(plain_pipeline), expected, atol=1e-4, rtol=1e-4)


def test_a_compiled_unet_gives_the_same(plain_pipeline):
    expected = unet_features(plain_pipeline)
    attach_random_module(plain_pipeline)
    plain_pipeline.unet = torch.compile(plain_pipeline.unet, backend="eager")
    sample(plain_pipeline)
    assert torch.equal(unet_features(plain_pipeline), expected)


def test_those_of_an_xl_unet_are_told_the_size():
    pipeline = make_xl_pipeline()
    expected = unet_features(pipeline)
    text, _, pooled, _ = pipeline.encode_prompt(["", ""], do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
    told = {"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)}
    made = []
    pipeline.unet.mid_block.register_forward_hook(lambda module, inputs, output: made.append(output))
    pipeline.unet(LATENTS, 0, encoder_hidden_states=text, added_cond_kwargs=told)
    assert torch.equal(expected, made[0].detach())


@pytest.mark.parametrize("latent_size", [8, 10, 12, 14, 16, 64])
def test_their_size_is_known_before(plain_pipeline, latent_size):
    image_features = Conditioner.of(plain_pipeline).backbone_features()
    features = image_features(IMAGE, torch.zeros(1, 4, latent_size, latent_size))
    size = image_features.size(latent_size)
    assert features.shape == (1, image_features.channels, size, size) and size <= 8


def test_full_size_features_on_the_meta_device():
    with init_empty_weights():
        for latent_size, config in ((64, {"cross_attention_dim": 768}), (128, SDXL_UNET)):
            unet = UNet2DConditionModel(**config).eval()
            told = {"encoder_hidden_states": torch.zeros(1, 77, unet.config.cross_attention_dim, device="meta")}
            if config is SDXL_UNET:
                sizes = {"text_embeds": 1280, "time_ids": 6}
                told["added_cond_kwargs"] = {n: torch.zeros(1, size, device="meta") for n, size in sizes.items()}
            image_features = BackboneFeatures(unet, [], lambda latents, told=told: told)
            latents = torch.zeros(1, 4, latent_size, latent_size, device="meta")
            assert image_features(latents, latents).shape == (1, 1280, 8, 8)
            assert (image_features.channels, image_features.size(latent_size)) == (1280, 8)


def test_a_unet_without_a_middle_block(plain_pipeline):
    plain_pipeline.unet = make_unet(cross_attention_dim=32, mid_block_type=None)
    with pytest.raises(ValueError, match="no middle block; use `--posterior_encoder vae` or `clip`"):
        Conditioner.of(plain_pipeline).backbone_features()


def test_other_weights_or_prompts_have_another_digest():
    pipeline = make_pipeline()
    digests = [Conditioner.of(pipeline).backbone_features().digest()]
    attach_random_module(pipeline)
    add_loras(pipeline)
    assert Conditioner.of(pipeline).backbone_features().digest() == digests[0]
    for model in (pipeline.unet, pipeline.text_encoder):
        with torch.no_grad():
            next(model.parameters()).add_(0.1)
        digests.append(Conditioner.of(pipeline).backbone_features().digest())
    assert len(set(digests)) == 3


# CLIP


@pytest.fixture
def clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, image_size=32, projection_dim=5)).eval()


def test_they_are_the_patches_of_what_clips_own_processor_makes(clip):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        tokens = clip(**processor(picture, return_tensors="pt")).last_hidden_state
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    features = ClipFeatures(clip)(pixels, LATENTS)
    assert features.shape == (1, 8, 8, 8)
    for row, column in ((0, 0), (0, 7), (5, 2)):
        torch.testing.assert_close(features[0, :, row, column], tokens[0, 1 + 8 * row + column], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("image_size", "size"), [(8, 2), (32, 8), (64, 8)])
def test_images_are_resized_and_maps_averaged(image_size, size):
    features = ClipFeatures(CLIPVisionModel(CLIPVisionConfig(**CLIP, image_size=image_size)).eval())
    for pixels in (IMAGE, torch.zeros(2, 3, 24, 48)):
        assert features(pixels, LATENTS).shape == (2, 8, size, size)
    assert features.channels == 8 and features.size(latent_size=99) == size


def test_a_folder_with_or_without_projection_is_loaded(clip, tmp_path):
    expected = ClipFeatures(clip)(IMAGE, LATENTS)
    clip.save_pretrained(tmp_path / "with")
    loaded = ClipFeatures.from_pretrained(str(tmp_path / "with"))
    assert torch.equal(loaded(IMAGE, LATENTS), expected)
    loaded.model.save_pretrained(tmp_path / "without")
    assert torch.equal(ClipFeatures.from_pretrained(str(tmp_path / "without"))(IMAGE, LATENTS), expected)


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing", embedded_base(), f"{embedded_base()}/text_encoder"])
def test_what_is_no_image_encoder_is_refused(name):
    with pytest.raises(ValueError, match="as `--posterior_encoder_model` in training"):
        ClipFeatures.from_pretrained(name)
