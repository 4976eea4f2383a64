"""DDIM and its inverse against the formulas of the papers, and against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ctx.pipelines.inversion import denoise, evenly_spaced_timesteps, invert, velocity


@pytest.fixture
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def smooth_model(x, t):
    return 0.5 * torch.sin(x) + 0.1 * x.roll(1, -1) - 0.0003 * t


def test_velocity_from_every_prediction_type():
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 3, 4, generator=generator).unbind()
    alpha = torch.tensor(0.3)
    x = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
    expected = alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0
    for prediction, kind in ((noise, "epsilon"), (x_0, "sample"), (expected, "v_prediction")):
        torch.testing.assert_close(velocity(prediction, x, alpha, kind), expected)
    with pytest.raises(ValueError, match="flow"):
        velocity(noise, x, alpha, "flow")


def test_denoising_is_ddim(scheduler):
    """Step for step what diffusers' scheduler does, from pure noise on, where the signal is zero."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = [999, 749, 499, 249, 0]
    got = denoise(smooth_model, x, scheduler.alphas_cumprod, timesteps)
    scheduler.num_inference_steps = 1000
    for t, s in zip(timesteps[:-1], timesteps[1:]):
        scheduler.config.num_train_timesteps = 1000 * (t - s)  # makes the scheduler's step lead from t to s
        x = scheduler.step(smooth_model(x, t), t, x).prev_sample
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


def test_inversion_is_undone_by_denoising(scheduler):
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = evenly_spaced_timesteps(1000, 20)
    errors = []
    for iterations in (1, 2, 4):
        noise = invert(smooth_model, clean, scheduler.alphas_cumprod, timesteps, iterations)
        assert (noise - clean).abs().max() > 0.1
        errors.append((denoise(smooth_model, noise, scheduler.alphas_cumprod, timesteps) - clean).abs().max().item())
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4


def test_timesteps_span_the_schedule():
    assert evenly_spaced_timesteps(1000, 4) == [999, 749, 500, 250, 0]
