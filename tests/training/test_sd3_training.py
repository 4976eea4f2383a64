"""Stable Diffusion 3 is trained by the same trainer: a transformer that predicts the velocity of a rectified flow."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from conftest import make_context_module, make_sd3_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3

from diffusers_ctx import ComposablePipeline, ComposableSD3Pipeline, ContextModule
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.adapter.image_features import BackboneFeatures
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training import ContextTrainer, parse_training_config
from diffusers_ctx.training.__main__ import main
from diffusers_ctx.training.diffusion.objective import DiffusionObjective, Draws
from diffusers_ctx.training.diffusion.trainable import count_learned, prepare_mode, split_parameters
from diffusers_ctx.training.encoding.batch import Batch

from .conftest import SD3_SCRIPT, create_stage, encoded_trainer, flags, make_options, run_forked
from .test_training_script import weights_of


# the transformers of Stable Diffusion 3 medium and 3.5 medium, by what differs from the defaults of diffusers;
# the table of positions, which is computed and no parameter, is cut to that of one image
SIZES = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 64}
# and the context module as training makes it by default
MODULE = {
    "token_dim": 4096,
    "caption_dim": 4096,
    "num_hidden_factors": 4,
    "noise_dim": 1,
    "concept_dim": 1,
    "posterior_encoder": "transformer",
    "posterior_in_channels": 1536,
    "posterior_feature_size": 8,
    "posterior_sample_size": 128,
}
FULL_SIZE = {
    "3": SIZES,
    "3.5": SIZES | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}


def create_sd3_trainer(base, photos, folder, **changes) -> ContextTrainer:
    config = parse_training_config(flags(make_options(base, photos, folder, **changes)))
    return ContextTrainer(config, ComposableSD3Pipeline.from_pretrained(base))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_script_trains_an_adapter_that_loads(sd3_base_model, photos, tmp_path, mode):
    options = make_options(
        sd3_base_model,
        photos,
        tmp_path,
        mode=mode,
        unfreeze_after=0.0,
        max_train_steps=3,
        random_flip=True,
        cache_latents=True,
        cache_dir=str(tmp_path / "cache"),
        timestep_sampling="logit_normal",
        composition_weight=1.0,
        validation_prompt="a street",
        num_validation_images=2,
        **({"train_text_encoder": True, "mixed_precision": "bf16"} if mode == "lora" else {}),
    )
    run_forked(SD3_SCRIPT, flags(options))
    assert (tmp_path / "validation" / "step-3.png").exists()
    pipeline = ComposableSD3Pipeline.from_pretrained(tmp_path if mode == "full" else sd3_base_model)
    pipeline.load_context_adapter(tmp_path)
    assert pipeline.concepts == ["night", "snow"]
    with_lora = {name for name, model in pipeline.components.items() if getattr(model, "peft_config", None)}
    assert with_lora == ({"transformer", "text_encoder", "text_encoder_2"} if mode == "lora" else set())
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = [
        pipeline("a street", interventions=names, generator=torch.manual_seed(0), **arguments).images
        for names in ([], ["night"], ["night", "snow"])
    ]
    assert len({image.tobytes() for image in images}) == 3
    factual = pipeline.counterfactual(images[1], ["night"], ["night"], num_inference_steps=2, guidance_scale=2.0)
    assert factual.images[0].size == (32, 32)
    config = json.loads((tmp_path / "context_module" / "config.json").read_text())
    assert config["posterior_encoder"] == ("vae" if mode == "full" else "transformer")


def test_a_frozen_transformer_is_resumed_exactly(sd3_base_model, photos, tmp_path):
    changes = {"mode": "frozen", "max_train_steps": 4, "checkpointing_steps": 2}
    trainer = create_sd3_trainer(sd3_base_model, photos, tmp_path, **changes)
    trainer.train()
    assert trainer.config.model.injection == "prompt"
    names = ["context_module/diffusion_pytorch_model.safetensors"]
    expected = weights_of(tmp_path, names)
    create_sd3_trainer(sd3_base_model, photos, tmp_path, **changes, resume_from_checkpoint="checkpoint-2").train()
    got = weights_of(tmp_path, names)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    learned = {name for name in expected if "read_out" in name}
    assert learned and any(expected[name].abs().max() > 0 for name in learned)


def test_the_transformer_is_told_text_and_pooled_text(sd3_base_model, photos, tmp_path):
    trainer = create_sd3_trainer(sd3_base_model, photos, tmp_path, proportion_empty_prompts=0.0)
    encoded_trainer(trainer)
    batch, random = next(trainer.batches.batches(0))
    _, draws, conditions = create_stage(trainer)._inputs(batch, random)
    text, _, pooled, _ = trainer.pipeline.encode_prompt(batch.captions, None, None, do_classifier_free_guidance=False)
    assert text.shape[1] == trainer.pipeline.tokenizer.model_max_length + 256
    torch.testing.assert_close(conditions["encoder_hidden_states"], text)
    torch.testing.assert_close(conditions["pooled_projections"], pooled)
    assert draws.timesteps.dtype == torch.int64


@torch.no_grad()
def test_the_loss_is_that_of_diffusers_own_script():
    pipeline, module = make_sd3_pipeline(), make_context_module()
    transformer = pipeline.transformer
    attach_context_module(transformer, module)
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 16, 16)
    mask = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]])
    eps, timesteps = torch.randn(4, *module.noise_shape), torch.tensor([0, 37, 500, 999])
    conditions = Conditioner.of(pipeline).unconditional_kwargs(latents)
    objective = DiffusionObjective(transformer, pipeline.scheduler)
    loss = objective(Batch(latents, None, mask, torch.zeros(4, 6), []), Draws(noise, timesteps, eps), conditions)

    tokens = module(module.posterior(latents, mask).at(eps), mask)
    text = torch.cat([conditions["encoder_hidden_states"], tokens.flatten(1, 2)], dim=1)
    pipeline.unload_context_adapter()
    # the script's scheduler counts from the noisy end; its shift is 3
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    told = scheduler.timesteps[999 - timesteps]
    torch.testing.assert_close(told[[0, 3]], torch.tensor([3 / 1.002, 1000.0]))
    sigmas = (told / 1000)[:, None, None, None]
    noisy = (1 - sigmas) * latents + sigmas * noise
    predicted = transformer(noisy, text, conditions["pooled_projections"], told).sample
    weighting = compute_loss_weighting_for_sd3("logit_normal", sigmas)
    torch.testing.assert_close(loss, (weighting * F.mse_loss(predicted, noise - latents, reduction="none")).mean())


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_what_learns_is_counted_before(mode):
    transformer = make_sd3_pipeline().transformer
    plain = {name for name, _ in transformer.named_parameters()}
    attach_context_module(transformer, make_context_module())
    count = count_learned(transformer, mode, rank=3)
    prepare_mode(transformer, mode, rank=3)
    adapter, backbone = split_parameters(transformer)
    assert count == sum(parameter.numel() for parameter in [*adapter, *backbone])
    named = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    if mode == "lora":  # text and image alike
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            assert any(f"attn.{layer}.lora_A" in name for name in named), layer
    assert (plain <= named) == (mode == "full") and bool(backbone) == (mode != "frozen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "v_prediction"}, "leave out `prediction_type` and `rescale_betas_zero_snr`"),
        ({"snr_gamma": 5.0}, "not for rectified flow; leave out `snr_gamma`"),
        ({"posterior_encoder": "unet"}, "has no unet; choose `posterior_encoder` transformer"),
        ({"mode": "full", "posterior_encoder": "transformer"}, "In mode full the transformer changes"),
        ({"resolution": 30}, "needs a multiple of 4"),
    ],
)
def test_what_a_transformer_cannot_is_refused(sd3_base_model, photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        create_sd3_trainer(sd3_base_model, photos, tmp_path, **changes).load()


def test_the_module_tells_families_apart(sd3_base_model, photos, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ContextTrainer, "train", lambda self: made.append(type(self.pipeline)))
    options = flags(make_options(sd3_base_model, photos, tmp_path / "out"))
    monkeypatch.setattr("sys.argv", ["training", *options])
    main()
    assert made == [ComposableSD3Pipeline]
    other = tmp_path / "flux"
    other.mkdir()
    index = {"_class_name": "Flux2Pipeline", "transformer": ["diffusers", "Flux2Transformer2DModel"]}
    (other / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("sys.argv", ["training", *flags(make_options(other, photos, tmp_path / "out"))])
    with pytest.raises(
        ValueError, match=r"for a Flux2Pipeline, and context adapters are for Stable Diffusion 1, 2, XL, 3"
    ):
        main()


@pytest.mark.parametrize("version", FULL_SIZE)
def test_the_medium_models_take_a_step_on_the_meta_device(version):
    with init_empty_weights(include_buffers=True):
        transformer = SD3Transformer2DModel(**FULL_SIZE[version])
        module = ContextModule(["night", "snow"], **MODULE)
        text = torch.zeros(1, 333, 4096, device="meta")
        told = {"encoder_hidden_states": text, "pooled_projections": torch.zeros(1, 2048, device="meta")}
        latents, noise = torch.zeros(2, 1, 16, 128, 128, device="meta")
        features = BackboneFeatures(transformer, [], lambda latents: told)(latents, latents)
        assert features.shape == (1, 1536, 8, 8)
        attach_context_module(transformer, module)
        prepare_mode(transformer, "lora", rank=16)
        objective = DiffusionObjective(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
        batch = Batch(latents, features, torch.zeros(1, 2, device="meta"), torch.zeros(1, 6, device="meta"), [""])
        timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
        draws = Draws(noise, timesteps, torch.zeros(1, *module.noise_shape, device="meta"))
        objective(batch, draws, told).backward()
    _, lora = split_parameters(transformer)
    assert all(parameter.grad.shape == parameter.shape for parameter in lora)


def test_a_checkpoint_of_stable_diffusion_3_is_refused_by_the_other_pipelines(sd3_base_model):
    with pytest.raises(ValueError, match=r"ComposablePipeline'> expected \[.*'unet'.*\], but only"):
        ComposablePipeline.from_pretrained(sd3_base_model)
