"""Training and sampling on a GPU, held against the CPU; without a GPU, everything here is skipped."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training.conftest import (  # noqa: F401 (fixtures)
    _reset_accelerate,
    base_model,
    flags,
    make_options,
    photos,
    xl_base_model,
)

from diffusers_ctx import ComposablePipeline
from diffusers_ctx.training import ContextTrainer, parse_training_config


REPOSITORY = Path(__file__).parents[2]
# steps that are in proportion to gradients: the usual ε would divide rounding errors by themselves
SMOOTH = {"learning_rate": 1e-3, "adam_epsilon": 1e-3}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def accelerate_on_the_gpu(monkeypatch):
    """The other tests keep Accelerate on the CPU, by a variable that is set when they are collected."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    _reset_accelerate()
    yield
    _reset_accelerate()


@pytest.fixture(autouse=True)
def exact_sums():
    """TF32 is off, also where PyTorch has it on by default, so that the GPU can be held against the CPU."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.fixture
def options(base_model, photos, tmp_path) -> Callable[..., dict]:  # noqa: F811
    """Options of a run into the folder of that name."""
    return lambda name="adapter", **changes: make_options(base_model, photos, tmp_path / name, **changes)


@pytest.fixture
def trainer_on(monkeypatch) -> Callable[..., ContextTrainer]:
    """Creates a trainer that will load its run on the device of that name."""

    def create(device: str, options: dict, kind: type = ComposablePipeline) -> ContextTrainer:
        _reset_accelerate()
        if device == "cpu":
            monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        else:
            monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
        checker = {"safety_checker": None} if kind is ComposablePipeline else {}
        pipeline = kind.from_pretrained(options["pretrained_model_name_or_path"], **checker)
        trainer = ContextTrainer(parse_training_config(flags(options)), pipeline)
        load = trainer.load

        def load_on_the_device() -> None:
            load()
            assert trainer.accelerator.device.type == device

        trainer.load = load_on_the_device  # type: ignore[method-assign]
        return trainer

    return create


@pytest.fixture
def environment() -> dict[str, str]:
    """That of a process of its own, which has the GPU and finds the library."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"} | {"PYTHONPATH": path}
