"""Optimizers by name, and what their absence says."""

import sys

import pytest
import torch

from diffusers_ctx.training.config import OptimizationConfig
from diffusers_ctx.training.diffusion.optimizer import check_optimizer, create_optimizer, create_schedule

from .conftest import create_stage, encoded_trainer


def parameter() -> torch.nn.Parameter:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(64, 128))  # large enough to have its state in 8 bits


@pytest.mark.parametrize(
    ("name", "package", "learning_rate"),
    [("adamw", "torch", 1e-2), ("adamw_8bit", "bitsandbytes", 1e-2), ("prodigy", "prodigyopt", 1.0)],
)
def test_each_one_minimises(name, package, learning_rate):
    pytest.importorskip(package)
    options = OptimizationConfig(optimizer=name, learning_rate=learning_rate, adam_weight_decay=0.0)
    check_optimizer(options, learning_rate)
    weight = parameter()
    optimizer = create_optimizer([weight], options, learning_rate)
    losses = []
    for _ in range(200):
        loss = (weight - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_adamw_has_the_options_hyperparameters():
    options = OptimizationConfig(adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.3, adam_epsilon=1e-5)
    defaults = create_optimizer([parameter()], options, 0.02).defaults
    assert (defaults["lr"], defaults["betas"]) == (0.02, (0.8, 0.9))
    assert (defaults["weight_decay"], defaults["eps"]) == (0.3, 1e-5)


@pytest.mark.parametrize(("warm_up", "steps"), [(None, 500), (0, 0), (10, 10)])
def test_schedules_but_the_constant_one_warm_up(warm_up, steps):
    options = OptimizationConfig(lr_scheduler="constant_with_warmup", lr_warmup_steps=warm_up)
    check_optimizer(options, 1.0)
    optimizer = create_optimizer([parameter()], options, 1.0)
    (rate,) = create_schedule(optimizer, options, 1000).lr_lambdas
    assert [rate(step) for step in (steps // 2, steps)] == [0.5 if steps else 1.0, 1.0]


@pytest.mark.parametrize(("name", "package"), [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_a_missing_package_is_named_before_anything_is_written(options, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        encoded_trainer(options | {"optimizer": name})
    assert not (tmp_path / "adapter").exists()


def test_options_that_cannot_work_are_refused(options):
    pytest.importorskip("prodigyopt")
    with pytest.raises(ValueError, match="set it to 1"):
        encoded_trainer(options | {"optimizer": "prodigy", "learning_rate": 1e-4})


def test_what_the_schedule_refuses_is_found_before_anything_is_encoded(options, tmp_path):
    changes = {"lr_scheduler": "polynomial", "learning_rate": 5e-8}  # which ends at 1e-7
    with pytest.raises(ValueError, match=r"The optimizer or its schedule cannot work .* must be smaller than initial"):
        encoded_trainer(options | changes)
    assert not (tmp_path / "adapter").exists()
    stage = create_stage(encoded_trainer(options | changes | {"scale_lr": True}))  # by the batch size of 4
    assert stage.schedule.get_last_lr() == [pytest.approx(2e-7)]
