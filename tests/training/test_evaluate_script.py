"""The evaluation: once in this process, and once by the script in two processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONCEPTS, attach_random_module
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_ctx import ComposablePipeline, embedded_base
from diffusers_ctx.evaluation import EvaluationConfig, Evaluator, kernel_distance, sliced_wasserstein_distance
from diffusers_ctx.evaluation.features import clip_features
from diffusers_ctx.keyed_random import keyed_generator, keyed_seed
from diffusers_ctx.pipelines.adapted import load_adapted_pipeline, recorded_base

from .conftest import EVALUATION_SCRIPT, files_in, flags, launch_forked


PICTURES = ("grid.png", "graph.png", "counterfactuals.png")


@pytest.fixture(scope="session")
def adapter(base_model, tmp_path_factory) -> Path:
    pipeline = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    return attach_random_module(pipeline).save_context_adapter(tmp_path_factory.mktemp("adapter") / "weather")


@pytest.fixture(scope="session")
def held_out(tmp_path_factory) -> Path:
    """Noisy pictures, 40x36, of two concepts and their composition; `obs` alone has captions."""
    root = tmp_path_factory.mktemp("data") / "held-out"
    rng = np.random.default_rng(7)
    for context, shade, count in (("obs", 100, 9), ("night", 40, 7), ("snow", 200, 6), ("night+snow", 140, 6)):
        (root / context).mkdir(parents=True)
        for index in range(count):
            pixels = rng.normal(shade, 40, (36, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / context / f"{index}.png")
    captions = ["file_name,text", *(f"{index}.png,a street number {index}" for index in range(9))]
    (root / "obs" / "metadata.csv").write_text("\n".join(captions))
    return root


@pytest.fixture
def options(base_model, tmp_path) -> dict:
    return make_options(base_model, tmp_path / "results")


def make_options(base_model: Path, output_dir: Path) -> dict:
    return {
        "pretrained_model_name_or_path": str(base_model),
        "output_dir": str(output_dir),
        "num_inference_steps": 2,
        "num_counterfactuals": 3,
        "batch_size": 2,
    }


def evaluate(adapter: Path, data: Path, options: dict) -> dict:
    config = EvaluationConfig(**options)
    pipeline, source, fingerprints = load_adapted_pipeline(adapter, config.pretrained_model_name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    Evaluator(config, pipeline, str(data), source, fingerprints).run()
    return json.loads((Path(options["output_dir"]) / "results.json").read_text())


@pytest.fixture(scope="session")
def results(adapter, held_out, base_model, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("evaluation") / "results"
    evaluate(adapter, held_out, make_options(base_model, output_dir))
    return output_dir


def metrics_of(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    return {name: results[name] for name in ("contexts", "concept", "composition", "gap", "counterfactuals", "graph")}


def numbers_in(metrics: dict | list | float) -> list:
    """All numbers in nested metrics, in order."""
    if isinstance(metrics, dict):
        metrics = list(metrics.values())
    return [number for entry in metrics for number in numbers_in(entry)] if isinstance(metrics, list) else [metrics]


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


# what a run leaves


def test_contexts_have_half_as_many_samples_as_images_each_from_noise_of_its_own(results):
    counts = {folder.name: len(list(folder.iterdir())) for folder in (results / "samples").iterdir()}
    assert counts == {"obs": 4, "night": 3, "snow": 3, "night+snow": 3}
    samples = np.concatenate([read(results / "samples" / context) for context in counts])
    assert samples.shape == (13, 32, 32, 3) and len(np.unique(samples, axis=0)) == 13


def halves_of_the_composition(held_out: Path) -> tuple[np.ndarray, np.ndarray]:
    def cropped(path: Path) -> np.ndarray:
        return np.asarray(ImageOps.fit(Image.open(path), (32, 32), Image.Resampling.LANCZOS))

    images = np.stack([cropped(held_out / "night+snow" / f"{index}.png") for index in range(6)])
    order = np.random.default_rng(keyed_seed(0, "held out")).permutation(6)
    return images[order[0::2]], images[order[1::2]]


def test_the_metrics_are_of_samples_and_two_halves_of_the_images(results, held_out):
    metrics = metrics_of(results)
    assert list(metrics["contexts"]) == ["obs", "night", "snow", "night+snow"]
    real, real_b = halves_of_the_composition(held_out)
    measured = metrics["contexts"]["night+snow"]
    assert measured["n"] == 3
    assert measured["floor"] == pytest.approx(sliced_wasserstein_distance(real_b, real))
    samples = read(results / "samples" / "night+snow")
    assert measured["swd"] == pytest.approx(sliced_wasserstein_distance(samples, real))
    assert metrics["concept"]["contexts"] == 2 and metrics["composition"]["swd"] == measured["swd"]


def test_samples_are_those_of_the_pipeline_under_the_interventions(results, adapter, base_model):
    pipeline = ComposablePipeline.from_pretrained(base_model, safety_checker=None)
    pipeline.load_context_adapter(adapter)

    def sample(context: str, interventions: list[str]) -> np.ndarray:
        generators = [keyed_generator(0, "samples", context, index) for index in range(2)]
        output = pipeline(
            ["", ""],
            interventions=interventions,
            generator=generators,
            num_inference_steps=2,
            guidance_scale=1.0,
            output_type="np",
        )
        return np.rint(output.images * 255)

    saved = read(results / "samples" / "night+snow")[:2]
    np.testing.assert_array_equal(sample("night+snow", ["night", "snow"]), saved)
    assert np.abs(sample("night+snow", []) - saved).max() > 5


def test_counterfactuals_are_of_observational_images(results):
    metrics = metrics_of(results)["counterfactuals"]
    assert metrics["n"] == 3 and list(metrics["composition"]) == ["0", "1", "10"]
    assert list(metrics["reversibility"]) == list(metrics["change"]) == CONCEPTS
    there, images = (read(results / "counterfactuals" / name) for name in ("do-snow", "unchanged-0"))
    assert there.shape == (3, 32, 32, 3) and not np.array_equal(there, images)


def test_the_table_and_the_pictures(results, capsys):
    table = (results / "results.md").read_text()
    assert "| night+snow" in table and "| mean of 2, concept" in table and "Composition gap" in table
    grid, graph, counterfactuals = (Image.open(results / name) for name in PICTURES)
    assert grid.size == ((4 + 1 + 4) * 32, 4 * (32 + 14)) and graph.width > 100
    assert counterfactuals.size == (3 * 32, (1 + 2 + 2 * len(CONCEPTS)) * (32 + 14))


def test_the_record_names_all_that_the_metrics_depend_on(results):
    record = json.loads((results / "results.json").read_text())
    assert record["pretrained_model_name_or_path"] == "tiny-stable-diffusion"
    assert record["settings"]["num_inference_steps"] == 2 and record["settings"]["resolution"] == 32
    assert record["versions"].keys() >= {"diffusers-ctx", "torch", "POT"} and record["num_processes"] == 1
    assert record["graph"]["nodes"] == [*CONCEPTS, "hidden_0", "hidden_1"] and record["adapter_commit"] is None


# stopped and gone on, in two processes


@pytest.fixture(scope="session")
def resumed(results, adapter, held_out, base_model, tmp_path_factory) -> Path:
    """By two processes, from a part of the images; another part is unlike what would be made."""
    output_dir = shutil.copytree(results, tmp_path_factory.mktemp("resumed") / "results")
    for name in (
        "results.json",
        "results.md",
        *PICTURES,
        "samples/night/00001.png",
        "counterfactuals/do-fog/00002.png",
    ):
        (output_dir / name).unlink()
    for name in ("samples/obs", "samples/night+snow", "counterfactuals/unchanged-4", "counterfactuals/undo-snow"):
        shutil.rmtree(output_dir / name)
    (output_dir / "samples" / "night" / "00001.unfinished").write_bytes(b"of a run that died")
    arguments = [adapter, held_out, *flags(make_options(base_model, output_dir))]
    run = launch_forked(EVALUATION_SCRIPT, arguments)
    assert (output_dir / "graph.png").exists(), run.stderr
    assert (output_dir / "results.md").read_text() in run.stdout
    return output_dir


def test_two_processes_that_go_on_find_what_one_did(results, resumed):
    """But for rounding: a batch is divided between them, and so numbers may be added up in another order."""
    assert json.loads((resumed / "results.json").read_text())["num_processes"] == 2
    assert numbers_in(metrics_of(resumed)) == pytest.approx(numbers_in(metrics_of(results)), abs=1e-4)
    before, after = ({path.relative_to(x) for path in x.rglob("*.png")} for x in (results, resumed))
    assert before == after
    for name in before:
        former, latter = (np.asarray(Image.open(x / name), dtype=int) for x in (results, resumed))
        assert np.abs(former - latter).max() <= 1, name


def test_images_that_are_there_are_not_made_again(results, adapter, held_out, options):
    shutil.copytree(results, options["output_dir"])
    mark = Path(options["output_dir"]) / "samples" / "snow" / "00000.png"
    Image.new("RGB", (32, 32), "red").save(mark)
    marked = mark.read_bytes()
    metrics = evaluate(adapter, held_out, options)["contexts"]
    assert mark.read_bytes() == marked
    former = metrics_of(results)["contexts"]
    assert metrics["snow"] != former["snow"] and metrics["night"] == former["night"]


# options


def test_fewer_samples_no_counterfactuals_and_features_of_clip(adapter, held_out, options, tmp_path):
    clip = tmp_path / "clip"
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPVisionConfig(**shape, image_size=8, patch_size=4, projection_dim=5)
    CLIPVisionModelWithProjection(config).save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(clip)
    options |= {"max_samples": 2, "num_counterfactuals": 0, "feature_extractor": str(clip)}
    results = evaluate(adapter, held_out, options)
    assert {metrics["n"] for metrics in results["contexts"].values()} == {2}
    assert "counterfactuals" not in results and not (Path(options["output_dir"]) / "counterfactuals.png").exists()
    real, _ = halves_of_the_composition(held_out)
    samples = read(Path(options["output_dir"]) / "samples" / "night+snow")
    kid, _ = kernel_distance(*map(clip_features(str(clip)), (samples, real[:2])), subset_size=2, num_subsets=100)
    assert results["contexts"]["night+snow"]["kid"] == pytest.approx(kid, rel=1e-4)


def test_the_base_is_what_the_adapter_names_where_that_can_be_loaded():
    def base(name: str | None, mode: str = "lora") -> str:
        return recorded_base("user/weather", {"base_model_name_or_path": name, "mode": mode})

    assert base("embedded_base()") == embedded_base()
    assert base('embedded_base("pictures")') == embedded_base("pictures")
    assert base("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert base("anything", mode="full") == "user/weather"
    for name in (None, "tiny-stable-diffusion"):
        with pytest.raises(ValueError, match=f"only as {name!r}; give .*`pretrained_model_name_or_path`"):
            base(name)


# what cannot work stops before anything is made


@pytest.fixture
def refuses(adapter, held_out, options):
    def check(message: str, data: Path = held_out, **changes) -> None:
        before = files_in(Path(options["output_dir"]))
        with pytest.raises(ValueError, match=message):
            evaluate(adapter, data, options | changes)
        assert files_in(Path(options["output_dir"])) == before

    return check


@pytest.fixture
def own_data(held_out, tmp_path) -> Path:
    """Held-out images that a test may spoil."""
    return shutil.copytree(held_out, tmp_path / "held-out")


def test_a_context_that_the_adapter_does_not_know(refuses, own_data):
    shutil.copytree(own_data / "snow", own_data / "night+rain")
    refuses(r"'night\+rain' intervenes on 'rain'; known are \['night', 'snow', 'fog'\]", own_data)


def test_a_context_with_too_few_images(refuses, own_data):
    for index in range(3):
        (own_data / "snow" / f"{index}.png").unlink()
    refuses("'snow' has 3 images", own_data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_samples", 1), ("num_counterfactuals", -1), ("batch_size", 0), ("guidance_scale", float("nan"))],
)
def test_options_out_of_range(refuses, name, value):
    refuses(f"`{name}` is {value}; it must be", **{name: value})


def test_samples_of_other_settings(refuses, results, options, own_data):
    shutil.copytree(results, options["output_dir"])
    message = "other settings: `num_inference_steps` was 2 and is 3; `guidance_scale` was 1.0 and is 2.0. Go back"
    refuses(message, num_inference_steps=3, guidance_scale=2.0)
    refuses("settings: `max_samples` was None and is 2", max_samples=2)
    captions = own_data / "obs" / "metadata.csv"
    captions.write_text(captions.read_text().replace("street", "road"))
    refuses("`captions of obs` was", own_data)


def test_a_folder_with_other_images(refuses, own_data):
    refuses("holds images and no settings.json that says how they were made", output_dir=str(own_data))


def test_samples_of_another_adapter(refuses, results, options, adapter, held_out, tmp_path):
    shutil.copytree(results, options["output_dir"])
    other = shutil.copytree(adapter, tmp_path / "weather")
    weights = other / "context_adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"`adapter` was '.*' and is"):
        evaluate(other, held_out, options)


def test_samples_of_another_base_of_the_same_name(refuses, results, options, base_model, tmp_path):
    shutil.copytree(results, options["output_dir"])
    other = shutil.copytree(base_model, tmp_path / base_model.name)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    refuses(r"settings: `base model` was '\w+' and is '\w+'\. Go back", pretrained_model_name_or_path=str(other))


def test_samples_of_unknown_settings(refuses, results, options):
    shutil.copytree(results / "samples", Path(options["output_dir"]) / "samples")
    refuses("holds images and no settings.json that says how they were made; choose another folder")
