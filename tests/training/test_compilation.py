"""Training with `accelerate launch --dynamo_backend ...`, which compiles what a step computes."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

from .conftest import WITHOUT_SEARCH, create_trainer, make_options
from .test_training_script import weights_of


# with the text encoder, what is compiled has all of what it has without
@pytest.mark.parametrize("train_text_encoder", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiled_training_is_plain_training_and_goes_on_as_such(
    base_model, photos, tmp_path, monkeypatch, train_text_encoder
):
    # the second step unfreezes the LoRA: what learns changes, and with it what was compiled
    options = make_options(
        base_model, photos, tmp_path / "plain", max_train_steps=3, unfreeze_after=0.3, checkpointing_steps=2
    )
    options |= WITHOUT_SEARCH | {"train_text_encoder": train_text_encoder}
    options["adam_epsilon"] = 1e-3  # the usual one would divide rounding errors by themselves
    create_trainer(options).train()
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
        AcceleratorState._reset_state()  # it would not look at the environment again
        counters.clear()
        create_trainer(options | {"output_dir": str(tmp_path / "compiled")}).train()
        assert counters["stats"]["unique_graphs"] > 0
    AcceleratorState._reset_state()
    shutil.copytree(tmp_path / "compiled" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    create_trainer(options | {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": "latest"}).train()
    expected = weights_of(tmp_path / "plain")
    for folder in ("compiled", "resumed"):
        got = weights_of(tmp_path / folder)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=2e-6, rtol=1e-4)
