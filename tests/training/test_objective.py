"""The diffusion loss against the formulas, recomputed from the betas."""

import numpy as np
import pytest
import torch
from conftest import CONCEPTS
from diffusers import DDPMScheduler, UNet2DConditionModel

from diffusers_ctx import ContextModule
from diffusers_ctx.adapter import attach_context_module, context_attention_layers
from diffusers_ctx.training.diffusion.objective import DiffusionObjective, Draws
from diffusers_ctx.training.encoding.batch import Batch


def with_module(unet: UNet2DConditionModel, context_module: ContextModule) -> UNet2DConditionModel:
    attach_context_module(unet, context_module)
    for layer in context_attention_layers(unet).values():
        torch.nn.init.normal_(layer["value"].weight)
    return unet


@pytest.fixture
def unet(plain_pipeline, context_module):
    return with_module(plain_pipeline.unet, context_module)


@pytest.fixture
def batch(context_module) -> dict:
    """By the names of what a step is made of; see `loss_of`."""
    torch.manual_seed(4)
    return {
        "latents": torch.randn(4, 4, 16, 16),
        "mask": torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]]),
        "conditions": {"encoder_hidden_states": torch.randn(4, 5, 32)},
        "noise": torch.randn(4, 4, 16, 16),
        "timesteps": torch.tensor([0, 37, 500, 999]),
        "eps": torch.randn(4, *context_module.noise_shape),
    }


def loss_of(objective: DiffusionObjective, one: dict) -> torch.Tensor:
    images = Batch(one["latents"], None, one["mask"], torch.zeros(len(one["mask"]), 6), [])
    return objective(images, Draws(one["noise"], one["timesteps"], one["eps"]), one["conditions"])


def row_of(batch: dict, row: int) -> dict:
    return {
        name: row_of(value, row) if isinstance(value, dict) else value[row : row + 1] for name, value in batch.items()
    }


def make_scheduler(prediction_type: str, zero_snr: bool) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )


def signal_levels(zero_snr: bool) -> np.ndarray:
    """sqrt(alpha-bar) of the scaled linear schedule; with zero terminal SNR shifted and scaled to end at 0 and begin
    where it did (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    levels = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    return (levels - levels[-1]) * levels[0] / (levels[0] - levels[-1]) if zero_snr else levels


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", True), ("epsilon", True)],
)
def test_the_loss_is_the_formula(unet, context_module, batch, prediction_type, zero_snr, snr_gamma):
    scheduler = make_scheduler(prediction_type, zero_snr)
    with torch.no_grad():
        loss = loss_of(DiffusionObjective(unet, scheduler, snr_gamma), batch).item()

    losses = []
    for row in range(4):
        one = row_of(batch, row)
        a = signal_levels(zero_snr)[one["timesteps"].item()]
        s = np.sqrt(1 - a**2)
        noisy = a * one["latents"] + s * one["noise"]
        posterior = context_module.posterior(one["latents"], one["mask"])
        z = posterior.mean.flatten() + posterior.factor[0] @ one["eps"].flatten()
        tokens = context_module(z.view_as(one["eps"]), one["mask"])
        with torch.no_grad():
            prediction = unet(
                noisy.float(),
                one["timesteps"],
                one["conditions"]["encoder_hidden_states"],
                added_cond_kwargs={"image_embeds": [tokens]},
            ).sample
        target = {
            "epsilon": one["noise"],
            "v_prediction": a * one["noise"] - s * one["latents"],
            "sample": one["latents"],
        }[prediction_type]
        snr = a**2 / s**2
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        weight = 1 if snr_gamma is None or snr == 0 else min(snr, snr_gamma) / divisor
        losses.append(weight * (prediction - target).square().mean().item())
    assert loss == pytest.approx(np.mean(losses), rel=2e-3)
    assert min(losses) >= 0 and np.ptp(losses) > 0.01 * max(losses)


@pytest.mark.parametrize("posterior_type", ["inverse", "amortized"])
def test_rows_do_not_mix_and_each_is_told_what_the_posterior_drew(plain_pipeline, batch, posterior_type):
    torch.manual_seed(1)
    module = ContextModule(CONCEPTS, token_dim=32, posterior_type=posterior_type, posterior_sample_size=16)
    for parameter in module.mechanism.parameters():
        torch.nn.init.normal_(parameter)
    unet = with_module(plain_pipeline.unet, module)
    objective = DiffusionObjective(unet, make_scheduler("v_prediction", True))
    with torch.no_grad():
        together = loss_of(objective, batch)
        apart = [loss_of(objective, row_of(batch, row)) for row in range(4)]
        other_noise = loss_of(objective, batch | {"eps": batch["eps"].flip(0)})
        other_context = loss_of(objective, batch | {"mask": batch["mask"].flip(0)})
    torch.testing.assert_close(together, torch.stack(apart).mean())
    assert (other_noise - together).abs() > 1e-5
    # an inverse posterior reads the same values off an image in every context
    assert ((other_context - together).abs() > 1e-5) == (posterior_type == "amortized")


def test_gradients_reach_the_adapter_and_the_module_is_saved_once(unet, context_module, batch):
    objective = DiffusionObjective(unet, make_scheduler("v_prediction", True))
    names = [name for name, _ in objective.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) and sum("read_out" in name for name in names) == len(
        list(context_module.read_out.parameters())
    )
    loss_of(objective, batch).backward()
    learning = [*context_module.read_out.parameters(), *context_attention_layers(unet).parameters()]
    assert all(parameter.grad.abs().max() > 0 for parameter in learning)
