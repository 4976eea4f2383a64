"""FLUX.1 is trained by the same trainer: packed latents, and timesteps that are shifted in sampling alone."""

import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from conftest import make_context_module, make_flux_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from diffusers_ctx import ComposableFluxPipeline, ContextModule
from diffusers_ctx.adapter import attach_context_module
from diffusers_ctx.adapter.backbones import backbone_of
from diffusers_ctx.adapter.image_features import BackboneFeatures
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training.diffusion.objective import DiffusionObjective, Draws
from diffusers_ctx.training.diffusion.trainable import prepare_mode, split_parameters
from diffusers_ctx.training.encoding.batch import Batch

from .conftest import FLUX_SCRIPT, flags, make_options


@pytest.fixture(scope="module")
def flux_base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base-flux") / "tiny-flux"
    make_flux_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["frozen", "lora"])
def test_an_adapter_is_trained_and_loads(flux_base_model, photos, tmp_path, run_program, mode):
    changes = {"train_text_encoder": True} if mode == "lora" else {"validation_prompt": "a street"}
    run_program(
        FLUX_SCRIPT,
        *flags(make_options(flux_base_model, photos, tmp_path, mode=mode, composition_weight=1.0, **changes)),
    )
    assert (tmp_path / "validation" / "step-2.png").exists() == (mode == "frozen")
    pipeline = ComposableFluxPipeline.from_pretrained(flux_base_model)
    pipeline.load_context_adapter(tmp_path)
    with_lora = {name for name, model in pipeline.components.items() if getattr(model, "peft_config", None)}
    assert with_lora == ({"transformer", "text_encoder"} if mode == "lora" else set())
    arguments = {"num_inference_steps": 2, "output_type": "np"}
    images = [
        pipeline("a street", interventions=names, generator=torch.manual_seed(0), **arguments).images
        for names in ([], ["night"], ["night", "snow"])
    ]
    assert len({image.tobytes() for image in images}) == 3
    factual = pipeline.counterfactual(images[1], ["night"], ["night"], num_inference_steps=2, guidance_scale=2.0)
    assert factual.images[0].size == (32, 32)
    config = json.loads((tmp_path / "context_module" / "config.json").read_text())
    assert config["posterior_encoder"] == "transformer"


@torch.no_grad()
def test_the_loss_is_that_of_diffusers_own_script():
    pipeline, module = make_flux_pipeline(), make_context_module()
    transformer = pipeline.transformer
    attach_context_module(transformer, module)
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8)
    mask = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 1]])
    eps, timesteps = torch.randn(3, *module.noise_shape), torch.tensor([0, 500, 999])
    conditions = Conditioner.of(pipeline).unconditional_kwargs(latents)
    objective = DiffusionObjective(transformer, pipeline.scheduler)
    loss = objective(Batch(latents, None, mask, torch.zeros(3, 6), []), Draws(noise, timesteps, eps), conditions)

    tokens = module(module.posterior(latents, mask).at(eps), mask)
    text = torch.cat([conditions["encoder_hidden_states"], tokens.flatten(1, 2)], dim=1)
    pipeline.unload_context_adapter()
    # the script's scheduler counts from the noisy end, and shifts nothing
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    told = scheduler.timesteps[999 - timesteps]
    torch.testing.assert_close(told, torch.tensor([1.0, 501.0, 1000.0]))
    sigmas = (told / 1000)[:, None, None, None]
    noisy = (1 - sigmas) * latents + sigmas * noise
    predicted = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, 3, 4, 8, 8),
        timestep=told / 1000,
        guidance=torch.ones(3),
        pooled_projections=conditions["pooled_projections"],
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32),
    ).sample
    predicted = FluxPipeline._unpack_latents(predicted, 16, 16, 2)
    torch.testing.assert_close(loss, F.mse_loss(predicted, noise - latents))


@pytest.mark.parametrize("is_shifted", [True, False])
def test_the_steps_are_those_of_the_pipeline(is_shifted):
    pipeline = make_flux_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=is_shifted)
    pipeline.register_modules(scheduler=scheduler)
    pipeline("", height=64, width=32, num_inference_steps=5, max_sequence_length=8, output_type="latent")
    steps = backbone_of(pipeline.transformer).noising(scheduler.config).steps(5, torch.zeros(1, 4, 32, 16))
    torch.testing.assert_close(torch.tensor([step.timestep for step in steps]), scheduler.timesteps)
    torch.testing.assert_close(torch.tensor([step.b for step in steps]), scheduler.sigmas.diff())


def test_flux_dev_takes_a_step_on_the_meta_device():
    """With two layers of each kind: all are alike."""
    with init_empty_weights(include_buffers=True):
        transformer = FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=2)
        module = ContextModule(
            ["night", "snow"],
            token_dim=4096,
            posterior_encoder="transformer",
            posterior_in_channels=3072,
            posterior_feature_size=8,
            posterior_sample_size=128,
        )
        text = torch.zeros(1, 512, 4096, device="meta")
        told = {"encoder_hidden_states": text, "pooled_projections": torch.zeros(1, 768, device="meta")}
        latents, noise = torch.zeros(2, 1, 16, 128, 128, device="meta")
        features = BackboneFeatures(transformer, [], lambda latents: told)(latents, latents)
        assert features.shape == (1, 3072, 8, 8)
        attach_context_module(transformer, module)
        prepare_mode(transformer, "lora", rank=16)
        objective = DiffusionObjective(transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        batch = Batch(latents, features, torch.zeros(1, 2, device="meta"), torch.zeros(1, 6, device="meta"), [""])
        timesteps = torch.zeros(1, dtype=torch.int64, device="meta")
        draws = Draws(noise, timesteps, torch.zeros(1, *module.noise_shape, device="meta"))
        objective(batch, draws, told).backward()
    _, lora = split_parameters(transformer)
    assert all(parameter.grad.shape == parameter.shape for parameter in lora)
