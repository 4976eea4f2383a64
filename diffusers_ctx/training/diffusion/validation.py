"""What has been learned so far: pictures, a row per context and a seed per column, and the loss on held-out images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image

from ...data import interventions_of
from ...evaluation.grids import sample_rows
from ...pipelines import Conditioner
from ...plot import draw_grid
from ..config import TrainingConfig
from ..encoding.latents import ContextLatents
from ..run.stop_signals import StopSignals
from ..run.tracking import track, track_step
from .objective import DiffusionObjective, Draws


# of what is held out, its crops and its noise: runs with other seeds are to be compared, so the run's own would not do
HELD_OUT_SEED = 0


class Validator:
    """Shows during training what has been learned so far.

    Args:
        config: what to validate.
        pipeline: the pipeline that learns, with its context adapter.
        held_out: images to log the loss on, if any.
        accelerator: has the trackers.
        stop: whoever asks the run to stop does not wait for this.
    """

    def __init__(
        self,
        config: TrainingConfig,
        pipeline: Any,
        held_out: ContextLatents | None,
        accelerator: Accelerator,
        stop: StopSignals,
    ):
        self.config = config
        self.pipeline = pipeline
        self.held_out = held_out
        self.accelerator = accelerator
        self.stop = stop

    @property
    def has_work(self) -> bool:
        """Whether the run asks for any of it."""
        return self.held_out is not None or self.config.output.validation_prompt is not None

    def __call__(self, objective: DiffusionObjective, step: int) -> None:
        """Logs the loss on held-out images, if there are any, and draws samples, if there is a prompt."""
        if self.held_out is not None:
            batch_size = self.config.optimization.train_batch_size
            losses = validation_losses(objective, self.pipeline, self.held_out, batch_size, self.stop)
            if losses is None:
                return
            metrics = {f"validation_loss/{name}": loss for name, loss in losses.items()}
            # a name of its own: a context may be called mean
            track_step(self.accelerator, metrics | {"mean_validation_loss": sum(losses.values()) / len(losses)}, step)
        if self.config.output.validation_prompt is not None:
            self._draw(step)

    def _draw(self, step: int) -> None:
        """Saves a grid of samples, a row per context, and hands it to the trackers."""
        output, obs_context = self.config.output, self.config.data.obs_context
        names = [obs_context, *self.pipeline.concepts, *(output.validation_interventions or [])]
        self.pipeline.set_progress_bar_config(disable=True)
        rows: list[np.ndarray] = []
        for name in names:
            if self.stop.received:
                return
            rows += sample_rows(
                self.pipeline,
                [interventions_of(name, obs_context)],
                [output.validation_prompt or ""] * output.num_validation_images,
                seed=self.config.optimization.seed,
                guidance_scale=output.validation_guidance_scale,
                resolution=self.config.data.resolution,
            )
        keep_grid(draw_grid(rows, names), Path(output.output_dir), step, self.accelerator.trackers)


def keep_grid(grid: Image.Image, output_dir: Path, step: int, trackers: Sequence[Any]) -> None:
    """Saves a step's grid as `output_dir/validation/step-<step>.png` and hands it to TensorBoard, W&B or trackio.

    Accelerate's own `log_images` takes another form of pictures for each tracker, steps that W&B refuses, and is
    missing for trackio.
    """
    folder = output_dir / "validation"
    folder.mkdir(exist_ok=True)
    file = folder / f"step-{step}.png"
    grid.save(file)
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name in ("wandb", "trackio"):
            library = importlib.import_module(tracker.name)
            track(tracker, {"validation": library.Image(str(file))}, step)


@torch.no_grad()
def validation_losses(
    objective: DiffusionObjective, pipeline: Any, latents: ContextLatents, batch_size: int, stop: StopSignals
) -> dict[str, float] | None:
    """Mean loss on held-out images of each context, without the weights of training.

    Noise and timesteps are always the same, so that steps and runs can be compared: an image has one timestep, and a
    context's images spread theirs evenly over the schedule.

    Args:
        objective: the loss, on its device.
        pipeline: encodes captions.
        latents: the held-out images.
        batch_size: images at once.
        stop: whether the run is asked to stop.

    Returns:
        The losses; `None` if the run was asked to stop.
    """
    noise = torch.randn(latents.mean.shape[1:], generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    timesteps = _spread_timesteps(latents.contexts, objective.noising.num_train_timesteps)
    losses: list[float] = []
    conditioner = Conditioner.of(pipeline)
    for rows in torch.arange(len(latents)).split(batch_size):
        if stop.received:
            return None
        batch = latents.mean_batch(rows)
        eps = torch.zeros(len(rows), *objective.context_module.noise_shape)  # the posterior's mean
        conditions = conditioner.caption_kwargs(batch.captions, batch.geometry)
        inputs = (batch, Draws(noise[rows], timesteps[rows], eps), conditions)
        losses += objective.losses(*send_to_device(inputs, pipeline.device)).tolist()
    names = np.array(latents.contexts)
    return {name: float(np.array(losses)[names == name].mean()) for name in dict.fromkeys(latents.contexts)}


def _spread_timesteps(contexts: Sequence[str], num_train_timesteps: int) -> torch.Tensor:
    """A timestep for each row: those of a context's rows are the middles of as many equal parts of the schedule."""
    names = np.array(contexts)
    timesteps = torch.zeros(len(names), dtype=torch.int64)
    for name in set(contexts):
        rows = np.flatnonzero(names == name)
        timesteps[rows] = torch.from_numpy((np.arange(len(rows)) + 0.5) / len(rows) * num_train_timesteps).long()
    return timesteps
