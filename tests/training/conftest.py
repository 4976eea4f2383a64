"""A tiny base model, photos in contexts, and ways to run the training script on them."""

import contextlib
import os


os.environ["ACCELERATE_USE_CPU"] = "true"  # a GPU adds in another order each time

import resource
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import make_components, make_sd3_pipeline, make_xl_pipeline
from forked import ForkedProgram, accelerate_launch, complete, run_script
from hub.hub_double import HubDouble
from PIL import Image

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.evaluation.grids import sample_rows
from diffusers_ctx.training import ContextTrainer, parse_training_config
from diffusers_ctx.training.diffusion.stage import DiffusionStage


SCRIPTS = Path(__file__).parents[2] / "train_scripts"
SCRIPT = SCRIPTS / "train_context_text_to_image.py"
EVALUATION_SCRIPT = SCRIPTS / "evaluate_context_adapter.py"
FLUX_SCRIPT = SCRIPTS / "train_context_text_to_image_flux.py"
SD3_SCRIPT = SCRIPTS / "train_context_text_to_image_sd3.py"
XL_SCRIPT = SCRIPTS / "train_context_text_to_image_sdxl.py"
IMAGES = {"night": 6, "obs": 7, "snow": 5}  # 21 rows an epoch: each context as often as the largest
WITHOUT_SEARCH = {"posterior_type": "amortized"}
"""Options of runs in which the search for a flow, half of their time, has no part in what is tested."""


@pytest.fixture(autouse=True)
def accelerate_as_in_a_new_process():
    """Before a test, for what shared fixtures have left, and after it, for the shared fixtures of the next one."""
    _reset_accelerate()
    yield
    _reset_accelerate()


@pytest.fixture(autouse=True)
def few_steps_of_validation_images(monkeypatch):
    num_inference_steps, *others = sample_rows.__defaults__
    assert num_inference_steps == 25
    monkeypatch.setattr(sample_rows, "__defaults__", (3, *others))


def _reset_accelerate() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture(scope="session")
def base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-stable-diffusion"
    ComposablePipeline(**make_components(), requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xl_base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base-xl") / "tiny-stable-diffusion-xl"
    make_xl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_base_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base-sd3") / "tiny-stable-diffusion-3"
    make_sd3_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Folders of noisy pictures, 40x36, with captions; each context has a shade of its own."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for shade, (context, count) in zip((40, 100, 200), IMAGES.items()):
        (root / context).mkdir(parents=True)
        captions = ["file_name,text"]
        for index in range(count):
            pixels = rng.normal(shade, 40, (36, 40, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / context / f"{index}.png")
            captions.append(f"{index}.png,a street number {index}")
        (root / context / "metadata.csv").write_text("\n".join(captions))
    return root


@pytest.fixture(scope="session")
def parquet(photos) -> Path:
    """The same photos in a folder that `datasets.load_dataset` reads."""
    folder = photos.parent / "table"
    folder.mkdir()
    files = [photos / context / f"{index}.png" for context, count in IMAGES.items() for index in range(count)]
    columns = {
        "image": [str(file) for file in files],
        "context": [file.parent.name for file in files],
        "text": [f"a street number {file.stem}" for file in files],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / "train.parquet"))
    return folder


@pytest.fixture
def options(base_model, photos, tmp_path) -> dict:
    return make_options(base_model, photos, tmp_path / "adapter")


@pytest.fixture(scope="session")
def hub():
    with HubDouble() as hub:
        yield hub


@pytest.fixture
def largest_file():
    """Sets how many bytes a file can have: what is written beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_options(base_model: Path, photos: Path | None, output_dir: Path, **changes) -> dict:
    """Options of a run of a second; `None` leaves one at its default."""
    return {
        "pretrained_model_name_or_path": str(base_model),
        "train_data_dir": str(photos) if photos else None,
        "output_dir": str(output_dir),
        "resolution": 32,
        "rank": 2,
        "concept_steps": 2,
        "concept_batch_size": 6,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 0,
        "report_to": "none",
    } | changes


def flags(options: dict) -> list[str]:
    given = {name: value for name, value in options.items() if value is not None}
    return [
        part
        for name, value in given.items()
        for part in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def create_trainer(options: dict) -> ContextTrainer:
    """What the training script creates, in this process."""
    config = parse_training_config(flags(options))
    pipeline = ComposablePipeline.from_pretrained(config.model.pretrained_model_name_or_path, safety_checker=None)
    return ContextTrainer(config, pipeline)


def load_trainer(options: dict) -> ContextTrainer:
    """A trainer that has read its data and checked everything."""
    trainer = create_trainer(options)
    trainer.load()
    return trainer


def encoded_trainer(options: dict | ContextTrainer) -> ContextTrainer:
    """A trainer that has encoded its images."""
    trainer = create_trainer(options) if isinstance(options, dict) else options
    trainer.load()
    with trainer.open():
        trainer.encode()
    return trainer


def create_stage(trainer: ContextTrainer) -> DiffusionStage:
    """The second stage of a trainer that has encoded its images, about to take its first step."""
    arguments = (trainer.accelerator, trainer.pipeline, trainer.batches, trainer.config)
    trainer.adapter_stage = DiffusionStage(*arguments, trainer.max_train_steps, trainer.learning_rate)
    return trainer.adapter_stage


def launch_script(
    script: Path, arguments: list, num_processes: int = 1, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user does, by `accelerate launch`, on the CPU. Each of its processes imports the library
    again: what is not about that runs [`launch_forked`]."""
    command = [Path(sys.executable).with_name("accelerate"), "launch", *launcher_flags(num_processes)]
    run = subprocess.run(
        [*command, script, *arguments],
        env=environment or dict(os.environ),
        capture_output=True,
        text=True,
        timeout=600,
    )
    # two gloo processes may abort at their exit, after all is written: judge those by their files
    assert run.returncode == 0 or num_processes > 1, run.stderr
    return run


def launch_forked(
    script: Path, arguments: list, launcher: list | None = None, timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Runs a script by `accelerate launch`, in forks, with these flags of the launcher; by default in two processes
    on the CPU. A run that hangs fails the test."""
    return complete(ForkedProgram(accelerate_launch, [*(launcher or launcher_flags(2)), script, *arguments]), timeout)


def run_forked(script: Path, arguments: list) -> None:
    """Runs a script in a fork; one that fails fails the test."""
    run = complete(ForkedProgram(run_script, script, arguments), timeout=180)
    assert run.returncode == 0, run.stderr


def launcher_flags(num_processes: int) -> list[str]:
    """Of `accelerate launch`, on the CPU."""
    shared = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    if num_processes == 1:
        return [*shared, "--cpu", "--num_processes=1"]
    # `--cpu` would start a single process
    return [*shared, "--multi_gpu", f"--num_processes={num_processes}", "--main_process_port=0"]


def files_in(folder: Path) -> dict[str, bytes]:
    with contextlib.suppress(FileNotFoundError):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {}
