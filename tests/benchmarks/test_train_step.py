"""The benchmark of a step: every case trains what it says, and times are taken and compared as they should."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_step
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import make_components
from methods.steps import EncodedLatents, StepSetting, create_run
from train_step import CASES, alternate, ratio_of_medians

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.training.run.keyed_noise import KeyedNoise


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> StepSetting:
    folder = tmp_path_factory.mktemp("base")
    ComposablePipeline(**make_components(), requires_safety_checker=False).save_pretrained(folder)
    return StepSetting(str(folder), train_batch_size=2, rank=2, work_dir=tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def accelerate_on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.mark.parametrize("name", CASES)
def test_a_step_changes_what_the_case_trains(setting, name):
    run = create_run(setting, CASES[name])
    unet = run.pipeline.unet
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    for _ in range(2):  # in the first one, keys and read-out have no gradient yet: values start at zero
        run.step()
    changed = {name for name, parameter in unet.named_parameters() if not torch.equal(parameter, before[name])}
    kinds = {"lora" if "lora_" in x else "adapter" if "_ip." in x or "read_out" in x else "unet" for x in changed}
    adapter = set() if name.startswith("plain") else {"adapter"}
    backbone = {"frozen": set(), "full": {"unet"}}.get(name, set() if "first-share" in name else {"lora"})
    assert kinds == adapter | backbone


def test_latents_that_are_encoded_in_the_step_are_the_cached_ones(setting):
    vae = setting.load_pipeline().vae
    cached, encoded = (setting.latents(vae, cached) for cached in (True, False))
    assert isinstance(encoded, EncodedLatents)
    rows, noise = torch.tensor([5, 0, 9]), torch.randn(3, *cached.mean.shape[2:])
    for draw in (lambda x: x.draw(rows, noise), lambda x: x.batch(rows, KeyedNoise(0, "diffusion", 4)).latents):
        torch.testing.assert_close(draw(cached), draw(encoded), rtol=1e-4, atol=1e-5)


def test_every_round_has_one_step_of_each():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(steps, rounds=4, warmup_rounds=2)
    assert [sorted(calls[start : start + 3]) for start in range(0, len(calls), 3)] == [["a", "b", "c"]] * 6
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 4)


def test_a_ratio_is_exact_where_the_machine_slows_both_down():
    reference = np.linspace(1.0, 3.0, 21)
    assert ratio_of_medians(2 * reference, reference) == {"ratio": 2.0, "interval": [2.0, 2.0]}
    noisy = reference[::-1] + np.random.default_rng(0).normal(0, 0.1, 21)
    low, high = ratio_of_medians(noisy, reference)["interval"]
    assert low < 1 < high


def test_results_are_written_and_shown(setting, tmp_path, monkeypatch, capsys):
    file = tmp_path / "results" / "train_step.json"
    flags = ["--pretrained_model_name_or_path", setting.base, "--train_batch_size", "2", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags, "--steps", "2", "--results", str(file)])
    monkeypatch.setattr(train_step, "peak_memory_alone", lambda name, args: 100.0)  # a process each takes too long
    train_step.main()
    results = json.loads(file.read_text())
    assert list(results["cases"]) == list(CASES)
    assert results["cases"]["plain-lora"]["to_plain_lora"] == {"ratio": 1.0, "interval": [1.0, 1.0]}
    assert results["cases"]["lora"]["median_seconds"] > 0 and results["encoding_to_cached"]["lora"]["ratio"] > 0
    options = {"base": Path(setting.base).name, "train_batch_size": 2, "rank": 2, "steps": 2}
    options |= {"mixed_precision": "no", "allow_tf32": False}
    assert results["options"] == options
    assert results["commit"] and results["versions"]["torch"] == torch.__version__
    assert "| plain-lora |" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["train_step.py", *flags, "--only", "frozen"])
    train_step.main()
    assert float(capsys.readouterr().out.split()[-1]) > 100
