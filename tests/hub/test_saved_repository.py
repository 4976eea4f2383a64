"""A repository of a pipeline that was saved with its context adapter."""

import json

import numpy as np
import pytest
import torch
from conftest import attach_random_module, make_pipeline

from diffusers_ctx import ComposablePipeline

from .hub_double import USER, HubDouble, run_client


REPO = f"{USER}/weather"
SAMPLE = """
import sys, diffusers, torch
from diffusers_ctx import ComposablePipeline

pipe = ComposablePipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe.set_progress_bar_config(disable=True)
options = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
print("sum", pipe("a square", interventions=["snow"], **options).images.double().sum().item())
plain = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
assert type(plain) is diffusers.StableDiffusionPipeline and plain.unet.encoder_hid_proj is None
"""


def sample(pipeline) -> np.ndarray:
    options = {"num_inference_steps": 1, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipeline("a square", interventions=["snow"], **options).images


def test_it_loads_in_a_fresh_process_and_then_offline(tmp_path):
    pipeline = attach_random_module(make_pipeline())
    expected = sample(pipeline)
    pipeline.save_pretrained(tmp_path / "pipeline", context_adapter=True)
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_context_adapter"] == "context_adapter" and index["_class_name"] == "StableDiffusionPipeline"
    files = {
        path.relative_to(tmp_path / "pipeline").as_posix(): path.read_bytes()
        for path in (tmp_path / "pipeline").rglob("*")
        if path.is_file()
    }
    (tmp_path / "home").mkdir()
    with HubDouble() as hub:
        hub.add_repo(REPO, files)
        client = run_client(SAMPLE, REPO, endpoint=hub.endpoint, hf_home=tmp_path / "home")
    assert client.returncode == 0, client.stderr
    assert float(client.stdout.split("sum")[1]) == pytest.approx(expected.astype(float).sum(), rel=1e-5)
    loaded = ComposablePipeline.from_pretrained(REPO, cache_dir=tmp_path / "home" / "hub")  # tests are offline
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(sample(loaded), expected, atol=1e-5)
