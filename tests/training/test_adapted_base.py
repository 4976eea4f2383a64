"""Training on a base that was saved with a context adapter: the new adapter takes the old one's place."""

import runpy
import sys

import pytest
from conftest import attach_random_module, make_pipeline

from diffusers_ctx.adapter import backbone_of
from diffusers_ctx.training import ContextTrainer

from .conftest import SCRIPT, flags, make_options


@pytest.mark.parametrize("way", ["script", "module"])
def test_a_base_that_was_saved_with_an_adapter_can_be_trained_on(photos, tmp_path, monkeypatch, way):
    pipeline = make_pipeline()
    attach_random_module(pipeline)
    pipeline.save_pretrained(tmp_path / "base", context_adapter=True)
    trained = []
    monkeypatch.setattr(ContextTrainer, "train", lambda trainer: trained.append(trainer))
    monkeypatch.setattr(sys, "argv", ["train", *flags(make_options(tmp_path / "base", photos, tmp_path / "adapter"))])
    if way == "script":
        runpy.run_path(str(SCRIPT), run_name="__main__")
    else:
        runpy.run_module("diffusers_ctx.training", run_name="__main__", alter_sys=False)
    assert backbone_of(trained[0].pipeline.unet).context_module is None
    trained[0].load()
    with trained[0].open():
        assert backbone_of(trained[0].pipeline.unet).context_module is trained[0].context_module
