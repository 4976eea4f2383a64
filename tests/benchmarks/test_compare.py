"""The comparison on test beds: shares that readers find right, a whole run, and its table."""

import json
import sys

import compare
import numpy as np
import pytest
from bed_tables import render_tables
from beds.quad_variants import QuadBed
from measure_bed import at_resolution, measure_combination, measure_counterfactuals, shares_right
from methods.baselines import LoraPerContext, MeanDifference
from methods.baselines.lora import load_base, plain_sampler
from methods.predicting import decode, encode
from methods.setting import Setting

from diffusers_ctx import embedded_base
from diffusers_ctx.evaluation.features import autoencode
from diffusers_ctx.evaluation.images import to_uint8


def real_images(bed):
    """A sampler that draws real images of each combination."""
    return lambda captions, interventions, seed: bed.sample(interventions, len(captions), seed).images


def test_real_images_are_right_and_those_of_another_combination_are_not():
    bed = QuadBed("binary")
    names = ("quad1", "quad2")
    right = measure_combination(bed, real_images(bed), names, 30, embedded_base())
    assert right["all_right"] > 0.9 * right["all_right_real"] > 0.7

    def draw_other(captions, interventions, seed):
        return bed.sample(("quad1",), len(captions), seed).images

    wrong = measure_combination(bed, draw_other, names, 30, embedded_base())
    assert wrong["right"]["quad1"] > 0.9 > 0.7 > wrong["right"]["quad2"]  # half have that value without it
    assert wrong["all_right"] < 0.7 and wrong["swd"] > right["swd"]


def test_true_counterfactuals_have_no_error_and_unchanged_images_that_of_the_intervention():
    bed = QuadBed("binary")
    names = ("quad1", "quad2")

    factual = bed.unseen((), 20)
    perfect = measure_counterfactuals(bed, lambda to: bed.counterfactual(factual, to).images, factual, names)
    assert perfect["error"] == 0 and perfect["all_right"] == perfect["subject"] == 1
    unchanged = measure_counterfactuals(bed, lambda _: factual.images, factual, names)
    assert unchanged["error"] == unchanged["error_unchanged"] == perfect["error_unchanged"] > 0.01
    assert unchanged["all_right"] < 0.7 and unchanged["subject"] == 1


def test_an_edit_without_an_intervention_returns_the_image(setting, tmp_path):
    LoraPerContext().train(setting, tmp_path)
    real = setting.bed.sample((), 2)
    edit = LoraPerContext().load_editor(setting, tmp_path)(real.images, real.captions)
    same = edit(())
    autoencoded = autoencode(load_base(setting).vae, real.images)
    assert np.abs(same.astype(int) - autoencoded).mean() < 2
    assert not np.array_equal(same, edit(("quad1", "quad2")))


def test_the_mean_difference_is_added_to_latents(setting, tmp_path):
    method = MeanDifference()
    real = setting.bed.sample((), 2)
    latents = setting.latents()
    groups = {name: latents.mean[0, np.array(latents.contexts) == name].mean(0) for name in setting.bed.contexts}
    pipeline = load_base(setting)
    moved = encode(pipeline, real.images) + groups["quad1"] + groups["size"] - 2 * groups["obs"]
    edited = method.load_editor(setting, tmp_path)(real.images, real.captions)(("quad1", "size"))
    np.testing.assert_array_equal(edited, to_uint8(decode(pipeline, moved)))
    sample = method.load(setting, tmp_path)
    plain, shifted = (sample(real.captions, names, 0) for names in ((), ("quad1",)))
    assert plain.shape == real.images.shape and not np.array_equal(plain, shifted)
    of_base = plain_sampler(pipeline, setting, lambda caption, _: caption)(real.captions, (), 0)
    assert np.abs(plain.astype(int) - of_base).max() <= 1


def test_shares_are_of_what_concepts_set_and_of_what_captions_name():
    bed = QuadBed("binary")
    real = bed.sample(("quad1",), 40, 3)
    true = real.attributes
    assert shares_right(bed, true, true, true, true)["all_right"] == 1
    read = true.copy()
    column = [attribute.name for attribute in bed.attributes].index("shape")
    read[:10, column] = (read[:10, column] + 1) % 4
    read[:20, 0] = 5.0
    shares = shares_right(bed, read, true, true, true)
    assert shares["subject"] == 0.75 and shares["all_right"] == shares["right"]["quad1"] == 0.5


def test_images_are_brought_to_a_beds_resolution():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, :2, :2] = 200
    assert at_resolution(image, 2)[0, :, :, 0].tolist() == [[200, 0], [0, 0]]
    assert at_resolution(image, 4) is image


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return Setting(
        bed=QuadBed("binary"),
        base=embedded_base(),
        seed=0,
        images_per_context=3,
        train_steps=2,
        concept_steps=2,
        baseline_steps=14,
        num_inference_steps=20,
        train_batch_size=8,
        work_dir=tmp_path_factory.mktemp("work"),
    )


@pytest.fixture
def options(tmp_path):
    return [
        *["quad-binary", "--images_per_context", "12", "--train_steps", "2", "--concept_steps", "4", "--n", "2"],
        *["--baseline_steps", "7", "--num_inference_steps", "1", "--train_batch_size", "8"],
        *["--work_dir", str(tmp_path / "work"), "--results_dir", str(tmp_path / "results")],
    ]


def test_methods_are_trained_and_measured_once(options, tmp_path, monkeypatch, capsys):
    methods = ["labels-only", "labels-scores", "mean-difference", "ours"]
    few = [(), ("quad1",), ("quad1", "quad2")]
    monkeypatch.setattr(compare, "combinations", lambda bed: few)
    monkeypatch.setattr(sys, "argv", ["compare.py", *options, "--methods", *methods])
    compare.main()
    folder = tmp_path / "results" / "quad-binary" / "quad-binary-seed0-images12-steps2"
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {f"{name}.{kind}" for name in methods for kind in ("json", "jpg")} <= set(files)
    compare.main()
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    results = json.loads((folder / "labels-scores.json").read_text())
    assert list(results["contexts"]) == ["obs", "quad1", "quad1+quad2"] and results["unet_steps"] == 0
    table = render_tables(tmp_path / "results" / "quad-binary")
    assert all(table.count(f"| {name} |") == 2 for name in methods)
    assert "| *real images* |" in table and "| *unchanged* |" in table
    assert list(results["counterfactuals"]) == ["quad1", "quad1+quad2"]

    guided = ["--guidance_scale", "3", "--methods", "labels-only"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *options, *guided])
    compare.main()  # the weights are there
    again = json.loads((folder.with_name(f"{folder.name}-guidance3") / "labels-only.json").read_text())
    plain = json.loads((folder / "labels-only.json").read_text())
    assert again["seconds"] == plain["seconds"] and "counterfactuals" not in again
    assert again["contexts"]["obs"]["swd"] != plain["contexts"]["obs"]["swd"]
