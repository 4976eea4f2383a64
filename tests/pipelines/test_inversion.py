"""Deterministic sampling and its inverse against the formulas of the papers, and against diffusers' schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ctx.adapter.backbones.noising import (
    RectifiedFlow,
    ddim_coefficients,
    ddim_steps,
    evenly_spaced_timesteps,
)
from diffusers_ctx.pipelines.inversion import denoise, invert


def make_scheduler(prediction_type: str) -> DDIMScheduler:
    """With zero terminal SNR where the prediction type allows it: a prediction of the noise says nothing there."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def smooth_model(x, t):
    return 0.5 * torch.sin(x) + 0.1 * x.roll(1, -1) - 0.0003 * t


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_denoising_is_ddim(prediction_type):
    """Step for step what diffusers' scheduler does, from the noisy end on."""
    scheduler = make_scheduler(prediction_type)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = [999, 749, 499, 249, 0]
    got = denoise(smooth_model, x, ddim_steps(scheduler.alphas_cumprod, timesteps, prediction_type))
    scheduler.num_inference_steps = 1000
    for t, s in pairwise(timesteps):
        scheduler.config.num_train_timesteps = 1000 * (t - s)  # makes the scheduler's step lead from t to s
        x = scheduler.step(smooth_model(x, t), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_inversion_is_undone_by_denoising(prediction_type):
    alphas = make_scheduler(prediction_type).alphas_cumprod
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = ddim_steps(alphas, evenly_spaced_timesteps(1000, 20), prediction_type)
    errors = []
    for iterations in (1, 2, 3, 6):
        noise = invert(smooth_model, clean, steps, iterations)
        assert (noise - clean).abs().max() > 0.1
        back = denoise(smooth_model, noise, steps)
        errors.append((back - clean).abs().max().item())
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 125 * errors[3]
    assert errors[3] < 1e-4


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_rectified_flow_is_followed_as_its_scheduler_does_and_back(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    steps = RectifiedFlow(scheduler.config).steps(20, torch.empty(2, 4, 8, 8))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = denoise(smooth_model, noise, steps)
    scheduler.set_timesteps(20)
    expected = noise
    for t in scheduler.timesteps:
        expected = scheduler.step(smooth_model(expected, t), t, expected).prev_sample
    torch.testing.assert_close(x, expected)
    errors = [(invert(smooth_model, x, steps, iterations) - noise).abs().max().item() for iterations in (1, 2, 3, 6)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 125 * errors[3]
    assert errors[3] < 1e-4


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="flow"):
        ddim_coefficients(torch.tensor(0.1), torch.tensor(0.5), "flow")


def test_timesteps_span_the_schedule():
    assert evenly_spaced_timesteps(1000, 4) == [999, 749, 500, 250, 0]
