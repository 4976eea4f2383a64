"""Stable Diffusion XL is trained by the same trainer; what its UNet is told besides is its own."""

import json

import pytest
import torch
from conftest import attach_random_module, make_xl_pipeline

from diffusers_ctx import ComposableXLPipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config

from .conftest import (
    EVALUATION_SCRIPT,
    XL_SCRIPT,
    create_stage,
    encoded_trainer,
    flags,
    load_trainer,
    make_options,
    run_forked,
)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_script_trains_an_adapter_that_loads(xl_base_model, photos, tmp_path, mode):
    options = make_options(
        xl_base_model,
        photos,
        tmp_path,
        mode=mode,
        unfreeze_after=0.0,
        max_train_steps=3,
        checkpointing_steps=2,
        random_flip=True,
        cache_latents=True,
        cache_dir=str(tmp_path / "cache"),
        validation_prompt="a street",
        validation_steps=3,
        num_validation_images=2,
        use_ema=True,
    )
    run_forked(XL_SCRIPT, flags(options))
    assert (tmp_path / "validation" / "step-3.png").exists()
    pipeline = ComposableXLPipeline.from_pretrained(tmp_path if mode == "full" else xl_base_model)
    pipeline.load_context_adapter(tmp_path)
    assert pipeline.concepts == ["night", "snow"]
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = [
        pipeline("a street", interventions=names, generator=torch.manual_seed(0), **arguments).images
        for names in ([], ["night"], ["night", "snow"])
    ]
    assert len({image.tobytes() for image in images}) == 3


def test_it_is_evaluated_with_its_own_pipeline(xl_base_model, photos, tmp_path):
    pipeline = attach_random_module(make_xl_pipeline())
    adapter = pipeline.save_context_adapter(tmp_path / "adapter")
    options = {
        "pretrained_model_name_or_path": str(xl_base_model),
        "output_dir": str(tmp_path / "results"),
        "num_inference_steps": 2,
        "num_counterfactuals": 2,
    }
    run_forked(EVALUATION_SCRIPT, [str(adapter), str(photos), *flags(options)])
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {"night", "snow", "obs"} <= set(results["contexts"])


def test_the_unet_is_told_size_and_crop_of_each_image(xl_base_model, photos, tmp_path):
    config = parse_training_config(flags(make_options(xl_base_model, photos, tmp_path, proportion_empty_prompts=0.0)))
    trainer = ContextTrainer(config, ComposableXLPipeline.from_pretrained(xl_base_model))
    encoded_trainer(trainer)
    batch, random = next(trainer.batches.batches(0))
    _, _, conditions = create_stage(trainer)._inputs(batch, random)
    told = conditions["added_cond_kwargs"]["time_ids"]
    # the pictures are 40 wide and 36 high: resized to 36 x 32, there are 3 or 4 columns to spare and no row
    for geometry, ids in zip(batch.geometry.tolist(), told.tolist()):
        assert ids[:2] == [36, 40] and ids[2] == 0 and 0 <= ids[3] <= 4 and ids[4:] == [32, 32]
        assert ids == geometry
    text, _, pooled, _ = trainer.pipeline.encode_prompt(batch.captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(conditions["encoder_hidden_states"], text)
    torch.testing.assert_close(conditions["added_cond_kwargs"]["text_embeds"], pooled)


def test_the_models_own_size_is_the_default(xl_base_model, photos, tmp_path):
    config = parse_training_config(flags(make_options(xl_base_model, photos, tmp_path, resolution=None)))
    trainer = ContextTrainer(config, ComposableXLPipeline.from_pretrained(xl_base_model))
    assert encoded_trainer(trainer).latents.mean.shape[-2:] == (16, 16)  # of 32 pixels


def test_a_checkpoint_of_the_other_kind_is_refused(base_model, xl_base_model, photos, tmp_path):
    with pytest.raises(ValueError, match=r"train_context_text_to_image_sdxl\.py"):
        load_trainer(make_options(xl_base_model, photos, tmp_path))
