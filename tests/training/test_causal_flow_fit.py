"""Learning what linear mechanisms leave out, in a world where a hidden factor is a curved function of a concept."""

import shutil

import pytest
import torch
from accelerate import Accelerator

from diffusers_ctx import ContextModule
from diffusers_ctx.context import GaussianPosterior
from diffusers_ctx.training import causal_flow_fit
from diffusers_ctx.training.causal_flow_fit import fit_causal_flow
from diffusers_ctx.training.latents import ContextLatents

from .conftest import create_trainer
from .test_training_script import weights_of


class OpenModule(ContextModule):
    """Images show the noise that they are made of."""

    def abduct(self, latents: torch.Tensor, mask: torch.Tensor) -> GaussianPosterior:
        noise = latents[:, :2, 0, :1]
        return GaussianPosterior.diagonal(noise, torch.full_like(noise, -20.0))


def make_module() -> ContextModule:
    """do(night) moves night to N(2, 0.25)."""
    torch.manual_seed(0)
    module = OpenModule(["night"], 8, num_hidden_factors=1, noise_dim=1, concept_dim=1, causal_flow=True)
    module.requires_grad_(False)
    module.mechanism.bias_do.fill_(2.0)
    module.mechanism.weight_do.fill_(0.5)
    return module


def make_latents(n: int, curved: bool = True) -> ContextLatents:
    """The noise of the hidden factor is 0.6 (night² - 1), but for a deviation of 0.3; or all is N(0, I)."""
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    masks = torch.arange(n)[:, None] % 2.0
    if curved:
        noise[:, 1] = hidden_of(noise, masks)
    latents = noise[None, :, :, None, None].expand(-1, -1, -1, 8, 8).contiguous()
    return ContextLatents(latents, torch.zeros_like(latents), masks, ["obs"] * n, [""] * n, torch.zeros(1, n, 6))


def hidden_of(noise: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    night = torch.where(masks[:, 0] > 0, 2 + 0.5 * noise[:, 0], noise[:, 0])
    return 0.6 * (night**2 - 1) + 0.3 * noise[:, 1]


def fit(latents: ContextLatents, seed: int = 0) -> ContextModule:
    module = make_module()
    fit_causal_flow(Accelerator(cpu=True), module, latents, seed)
    return module


@pytest.fixture(scope="module")
def fitted() -> ContextModule:
    return fit(make_latents(4000))


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_a_curved_mechanism_is_found_and_goes_with_the_value_under_interventions(fitted, mask):
    noise = torch.randn(2000, 2, 1, generator=torch.Generator().manual_seed(1))
    masks = torch.full((2000, 1), mask)
    z = fitted.mechanism_noise(noise, masks)[..., 0]
    torch.testing.assert_close(z[:, 0], noise[:, 0, 0], atol=0.3, rtol=0)  # which was N(0, 1) already
    expected = hidden_of(torch.stack([z[:, 0], torch.zeros(2000)], dim=1), masks)
    common = z[:, 0].abs() < 2
    error = (z[:, 1] - expected)[common]
    assert error.mean().abs() < 0.05 and error.std() == pytest.approx(0.3, abs=0.05)


def test_real_noise_becomes_standard_normal(fitted):
    latents = make_latents(4000)
    exogenous = fitted.exogenous_noise(latents.mean[0, :, :, 0, :1], latents.masks)[..., 0]
    for mask in (0.0, 1.0):
        part = exogenous[latents.masks[:, 0] == mask]
        assert part.mean(dim=0).abs().max() < 0.08 and (part.std(dim=0) - 1).abs().max() < 0.08
        assert torch.corrcoef(part.abs().T)[0, 1].abs() < 0.1


def test_noise_that_is_standard_normal_already_is_hardly_changed():
    module = fit(make_latents(4000, curved=False))
    noise = torch.randn(500, 2, 1, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    assert (module.mechanism_noise(noise, torch.zeros(500, 1)) - noise).abs().mean() < 0.1


def test_too_few_images_change_nothing():
    flow, unfitted = fit(make_latents(199)).flow.state_dict(), make_module().flow.state_dict()
    assert all(torch.equal(flow[name], weight) for name, weight in unfitted.items())


def test_it_is_the_same_with_the_same_seed(fitted):
    torch.manual_seed(5)
    again = fit(make_latents(4000)).flow.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in fitted.flow.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fitted.parameters())


def test_a_run_that_goes_on_has_the_flow_that_it_had(options, tmp_path, monkeypatch):
    monkeypatch.setattr(causal_flow_fit, "_LEAST_HELD_OUT", 1)
    monkeypatch.setattr(causal_flow_fit, "_HELD_OUT_SHARE", 0.4)  # or chance would decide what is kept
    monkeypatch.setattr(causal_flow_fit, "_STEPS_OF_A_TRIAL", 10)
    monkeypatch.setattr(causal_flow_fit, "_STEPS", 100)
    plan = options | {"checkpointing_steps": 2, "max_train_steps": 4}
    whole = create_trainer(plan | {"output_dir": str(tmp_path / "whole")}).train()
    kept = ContextModule.from_pretrained(whole / "context_module").flow.state_dict()
    assert kept["last.weight"].any()
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}
    create_trainer(plan | resumed).train()
    weights = [weights_of(folder) for folder in (whole, tmp_path / "resumed")]
    assert not [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert any("flow.last.weight" in name for name in weights[0])
