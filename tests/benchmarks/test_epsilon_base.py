"""The comparison of remedies for a base that predicts the noise: what methods share, and each one's remedy."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from epsilon_base import MEASURED, METHODS, Results, lightness, parse_args, render_tables
from methods.context_adapter import load_pipeline
from methods.quad_setting import QuadSetting
from PIL import Image

from diffusers_ctx import embedded_base


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> QuadSetting:
    """On the small base, declared to predict the noise."""
    work_dir = tmp_path_factory.mktemp("epsilon")
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_base())
    options = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    pipeline.save_pretrained(work_dir / "base")
    return QuadSetting(
        dependent=True,
        seed=7,
        images_per_context=12,
        train_steps=1,
        concept_steps=4,
        baseline_steps=0,
        num_inference_steps=2,
        train_batch_size=8,
        work_dir=work_dir,
        base=str(work_dir / "base"),
    )


def test_methods_share_concepts_and_differ_in_their_remedy(setting):
    folder = setting.work_dir / "methods"
    for name in ("epsilon", "v-prediction-lora"):
        METHODS[name].train(setting, folder / name)
    plain, remedied = (load_pipeline(folder / name, setting.base) for name in ("epsilon", "v-prediction-lora"))
    (file,) = setting.folder.glob("concepts-*.pt")  # both have the same
    concepts = torch.load(file)
    for pipeline in (plain, remedied):
        state = pipeline.context_module.state_dict()
        assert all(torch.equal(state[key], value) for key, value in concepts.items() if "read_out" not in key)
    assert plain.scheduler.config.prediction_type == "epsilon" and plain.scheduler.alphas_cumprod[-1] > 0
    assert remedied.scheduler.config.prediction_type == "v_prediction" and remedied.scheduler.alphas_cumprod[-1] == 0
    leading, trailing = (METHODS[name].load(setting, folder / name) for name in ("epsilon", "epsilon-trailing"))
    captions = ["a picture of a circle"] * 2
    assert not np.array_equal(leading(captions, ["quad1"], 0), trailing(captions, ["quad1"], 0))


def test_milder_remedies_reach_the_run(setting, tmp_path):
    optimization = {
        name: METHODS[name].config(setting, tmp_path).optimization for name in ("noise-offset", "high-noise")
    }
    plain = METHODS["epsilon"].config(setting, tmp_path)
    assert optimization["noise-offset"] == replace(plain.optimization, noise_offset=0.1)
    assert optimization["high-noise"] == replace(plain.optimization, timestep_sampling="high_noise")
    assert plain.model.pretrained_model_name_or_path == setting.base


def test_another_sampling_of_a_method_that_was_not_trained_says_what_to_run(setting, tmp_path):
    with pytest.raises(FileNotFoundError, match="Run the method 'epsilon' first"):
        METHODS["epsilon-trailing"].train(setting, tmp_path / "epsilon-trailing")


def test_lightness_is_that_of_whole_images():
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    images[1] = 255
    found = lightness(images, images[1:])
    assert found["lightness"] == found["lightness_deviation"] == 0.5
    assert (found["lightness_real"], found["lightness_deviation_real"]) == (1, 0)


def test_results_of_other_options_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["epsilon_base.py", "--results", str(file)])
    Results(parse_args()).keep()
    assert Results(parse_args()).content["command"] == f"python epsilon_base.py --results {file}"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--n", "3"])
    with pytest.raises(ValueError, match="give the same options, or another --results"):
        Results(parse_args())


@pytest.mark.slow
def test_the_comparison_is_made_and_not_made_again(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, FOLDER / "epsilon_base.py", "--work_dir", tmp_path / "work", "--results", file]
    command += ["--base_steps", "2", "--images_per_context", "12", "--concept_steps", "4", "--train_steps", "2"]
    written = []
    for _ in range(2):
        subprocess.run([*map(str, command), "--n", "20", "--num_inference_steps", "2"], check=True)
        written.append(file.stat().st_mtime_ns)
    assert written[0] == written[1]
    results = json.loads(file.read_text())
    assert list(results["methods"]) == list(METHODS) and all(
        f"| {name} | 0." in render_tables(results) for name in METHODS
    )
    picture = Image.open(file.with_suffix(".jpg"))
    assert picture.size == (64 * 4 * len(MEASURED), 64 * (1 + len(METHODS)))
