"""Paths that users give: `~` is their home folder, and a mistyped folder is refused at once."""

import json
import sys
from pathlib import Path

import pytest
from conftest import attach_random_module, make_pipeline

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.adapter.image_features import ClipFeatures
from diffusers_ctx.adapter_format import AdapterError
from diffusers_ctx.data import load_context_dataset, quad
from diffusers_ctx.data.streaming import open_stream
from diffusers_ctx.evaluation import EvaluationConfig
from diffusers_ctx.evaluation.features import clip_features
from diffusers_ctx.hub import push_adapter_folder, resolve_adapter_folder
from diffusers_ctx.paths import existing_folder, local_or_hub, local_path
from diffusers_ctx.training import parse_training_config


PATHS = {
    "pretrained_model_name_or_path": "base",
    "train_data_dir": "photos",
    "cache_dir": "cache",
    "posterior_encoder_model": "clip",
    "output_dir": "weather",
    "logging_dir": "logs",
    "resume_from_checkpoint": "weather/checkpoint-1",
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder; the working folder is another one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    yield home
    assert not Path("~").exists()


def values_of(config) -> dict:
    return {name: value for group in vars(config).values() for name, value in vars(group).items()}


@pytest.mark.parametrize("written", ["file", "flags", "flags after a file"])
def test_every_path_of_a_training_config_may_begin_at_home(home, written):
    given = {name: f"~/{path}" for name, path in PATHS.items()}
    flags = [f"--{name}={path}" for name, path in given.items()]
    (home / "run.json").write_text(json.dumps(given if written == "file" else {}))
    arguments = {"file": ["~/run.json"], "flags": flags, "flags after a file": ["~/run.json", *flags]}[written]
    values = values_of(parse_training_config(arguments))
    assert {name: values[name] for name in PATHS} == {name: f"{home}/{path}" for name, path in PATHS.items()}
    dataset = parse_training_config(["--pretrained_model_name_or_path=a/b", "--dataset_name=~/table"]).data
    assert dataset.dataset_name == f"{home}/table" and dataset.source_options()["source"] == f"{home}/table"


def test_every_path_of_an_evaluation_may_begin_at_home(home):
    names = (
        "output_dir",
        "pretrained_model_name_or_path",
        "posterior_encoder_model",
        "feature_extractor",
        "cache_dir",
    )
    config = EvaluationConfig(**{name: f"~/{name}" for name in names})
    assert [getattr(config, name) for name in names] == [f"{home}/{name}" for name in names]


def test_paths_are_texts_in_a_config(home):
    assert EvaluationConfig(output_dir=Path("~/results")).output_dir == f"{home}/results"


def test_an_unknown_home_is_refused():
    with pytest.raises(ValueError, match=r"'~nobody-of-that-name/x' names no user's home folder"):
        parse_training_config(["--pretrained_model_name_or_path=a/b", "--train_data_dir=~nobody-of-that-name/x"])
    assert local_path("./~here") == Path("~here")  # a folder may have such a name


def test_adapters_and_pipelines_are_saved_and_loaded_at_home(home):
    pipeline = attach_random_module(make_pipeline())
    assert pipeline.save_context_adapter("~/adapter") == home / "adapter"
    pipeline.save_pretrained("~/base")
    assert resolve_adapter_folder("~/adapter") == home / "adapter"
    loaded = ComposablePipeline.from_pretrained("~/base", safety_checker=None)
    loaded.load_context_adapter("~/adapter")
    assert loaded.concepts == pipeline.concepts
    (home / "adapter" / "README.md").unlink()
    with pytest.raises(AdapterError, match=f"There is no {home}/adapter/README.md"):
        push_adapter_folder("~/adapter", "ada/weather")


def test_images_are_written_and_read_at_home(home):
    assert quad.write_folders("~/photos", n=1) == home / "photos"
    assert len(load_context_dataset("~/photos")) == len(load_context_dataset(Path("~/photos"))) == 7
    assert len(open_stream("~/photos").contexts) == 7


def test_scripts_take_paths_at_home(home, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "train_scripts"))
    import demo_quad

    monkeypatch.setattr(sys, "argv", ["demo_quad.py", "--output_dir=~/demo"])
    assert demo_quad.demo.make_context("demo", sys.argv[1:]).params["output_dir"] == home / "demo"


# mistyped folders


@pytest.fixture
def folders():
    for name in ("weather", "runs/adapter", "runs/other"):
        Path(name).mkdir(parents=True)
    Path("weights.safetensors").touch()


MISTYPED = {
    "./weahter": "check the path: did you mean 'weather'?",
    "weahter": "check the path: did you mean 'weather'? For a repository on the Hub, write owner/name.",
    "runs/adaptr": "did you mean 'runs/adapter'? For a repository on the Hub, start outside",
    "runs/last": "the folders in 'runs' are adapter, other.",
    "weather/x/y": "there are no folders in 'weather'.",
    "../here/weathr": "did you mean '../here/weather'?",
    "a/b/c": "the folders in '.' are runs, weather.",
    "photos\\night": "check the path",
}


@pytest.mark.parametrize("name", MISTYPED)
def test_what_is_no_hub_id_is_refused_with_the_nearest_names(folders, name):
    for load in (local_or_hub, ComposablePipeline.from_pretrained, clip_features, load_context_dataset, open_stream):
        with pytest.raises(FileNotFoundError) as raised:
            load(name)
        assert f"There is no folder '{name}'; " in str(raised.value) and MISTYPED[name] in str(raised.value)
    for load, error in ((resolve_adapter_folder, AdapterError), (ClipFeatures.from_pretrained, ValueError)):
        with pytest.raises(error) as raised:
            load(name)
        assert MISTYPED[name] in str(raised.value)


def test_a_path_is_never_asked_for_on_the_hub(folders):
    for name in ("some/where", "photos"):  # which may be ids
        with pytest.raises(FileNotFoundError, match=f"There is no folder '{name}'"):
            load_context_dataset(Path(name))
        with pytest.raises(FileNotFoundError):
            existing_folder(name)


@pytest.mark.parametrize("name", ["weather/", "weather", "runs/adapter", "runs/../weather"])
def test_a_folder_is_found(folders, name):
    assert local_or_hub(name) == name and existing_folder(name) == Path(name)


@pytest.mark.parametrize("name", ["gpt2", "stabilityai/sdxl", "ada/weather", "CompVis/stable-diffusion-v1-4"])
def test_a_hub_id_is_left_alone(folders, name):
    assert local_or_hub(name) == name


def test_a_file_is_no_folder(folders):
    for load in (local_or_hub, existing_folder, ComposablePipeline.from_pretrained):
        with pytest.raises(NotADirectoryError, match=r"'weights.safetensors' is a file; give a folder"):
            load("weights.safetensors")
