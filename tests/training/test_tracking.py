"""What trackers are told of both parts of training."""

import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_ctx.training import trainer
from diffusers_ctx.training.run.tracking import start_trackers, track, track_concepts, track_step

from .conftest import create_trainer


KL = [f"kl/{name}" for name in ("night", "snow", "hidden_0", "hidden_1", "hidden_2", "hidden_3")]
METRICS = ["contrastive_loss", "latent_swd", "noise_swd", "reconstruction", *KL]


@pytest.fixture
def logged(options, tmp_path):
    """Trains and reads TensorBoard's files."""

    def run(**changes) -> EventAccumulator:
        folder = create_trainer(options | {"report_to": "tensorboard"} | changes).train()
        (events,) = (folder / "logs" / "context-adapter").glob("events.*")
        return EventAccumulator(str(events)).Reload()

    return run


def test_concepts_are_curves_of_their_own_steps(logged):
    events = logged(concept_steps=45, max_train_steps=3)
    # 14 steps (0.3) on a code, 4 (0.1) of reading, the rest on all terms: every tenth, and the last of each stage
    steps = {"code/": [10, 14], "reading/": [18], "": [20, 30, 40, 45]}
    names = {"code/": ["reconstruction", "kl"], "reading/": ["reconstruction", "error"], "": METRICS}
    for stage, expected in steps.items():
        for name in names[stage]:
            assert [event.step for event in events.Scalars(f"concepts/{stage}{name}")] == expected
    tracked = {tag for tag in events.Tags()["scalars"] if tag.startswith("concepts/")}
    assert tracked == {f"concepts/{stage}{name}" for stage in steps for name in names[stage]}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert all(events.Scalars(f"concepts/{name}")[0].value > 0 for name in KL)


def test_a_run_that_goes_on_has_no_concepts_to_learn(logged, tmp_path):
    logged(checkpointing_steps=1)
    shutil.rmtree(tmp_path / "adapter" / "logs")
    tags = logged(max_train_steps=4, resume_from_checkpoint="latest").Tags()["scalars"]
    assert "loss" in tags and not [tag for tag in tags if re.match("concepts/|kl/", tag)]


class StandInForWandB(GeneralTracker):
    """Keeps what W&B would be sent, which must not name steps: they would go back."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.axes: dict[str, str] = {}
        self.rows: list[dict] = []

    @property
    def tracker(self):
        return SimpleNamespace(define_metric=lambda name, step_metric: self.axes.update({name: step_metric}))

    def store_init_configuration(self, values: dict):
        pass

    def log(self, values: dict, step: int | None = None, **kwargs):
        assert step is None
        self.rows.append(values)


class Refusing(GeneralTracker):
    """As W&B without an API key."""

    name = "refusing"
    requires_logging_directory = False

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values: dict):
        raise ValueError("No API key configured")

    def log(self, values: dict, step: int | None = None, **kwargs):
        pass


def test_a_tracker_that_refuses_does_so_before_anything_is_encoded(options, monkeypatch):
    def create(config) -> Accelerator:
        return Accelerator(cpu=True, log_with=Refusing())

    monkeypatch.setattr(trainer, "create_accelerator", create)
    monkeypatch.setattr(trainer, "encode_images", lambda *_, **__: pytest.fail("images were encoded"))
    with pytest.raises(RuntimeError, match=r"No API key configured.*log in to the tracker, or choose another one"):
        create_trainer(options).train()


def test_wandb_has_the_axes_as_metrics():
    wandb = StandInForWandB()
    accelerator = Accelerator(cpu=True, log_with=wandb)
    start_trackers(accelerator, {})
    track_concepts(accelerator, {"kl/night": 0.5}, 40)
    track_step(accelerator, {"loss": 1.0, "lr": 0.1, "gradient_norm": 2.0}, 1)
    track_step(accelerator, {"validation_loss/obs": 3.0, "mean_validation_loss": 3.0}, 1)
    track(wandb, {"validation": "a picture"}, 1)
    assert wandb.rows[0] == {"concepts/kl/night": 0.5, "concepts/step": 40}
    assert wandb.rows[1] == {"loss": 1.0, "lr": 0.1, "gradient_norm": 2.0, "step": 1}
    for row in wandb.rows:
        for name in row.keys() - {"step", "concepts/step"}:
            (axis,) = {axis for pattern, axis in wandb.axes.items() if fnmatch(name, pattern)}
            assert axis in row
