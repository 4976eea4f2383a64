"""The second stage of training: the adapter learns with the diffusion loss, around concepts that stay as they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, send_to_device
from diffusers.training_utils import cast_training_params
from tqdm.auto import tqdm

from ...adapter import backbone_of_pipeline
from ...data import ContextBalancedSampler
from ...pipelines import CompositionMixin, Conditioner
from ..config import TrainingConfig
from ..encoding.batch import Batch, Batches
from ..run.checkpoints import checkpoint_step, register_trained_weights
from ..run.keyed_noise import KeyedNoise
from ..run.sharding import full_tensor, gather_weights, start_moments
from ..run.stop_signals import StopSignals
from ..run.tracking import track_step
from .composition import COMPOSED_SHARE, draw_combinations
from .ema import averaged, create_average
from .noise_trial import CONFIRMED, TRIAL_SHARE, NoiseTrial
from .objective import CaptionEncoder, DiffusionObjective, Draws
from .optimizer import create_optimizer, create_schedule
from .timesteps import sample_timesteps
from .trainable import gradients_off, learning_text_encoders, prepare_mode, split_parameters


_SINGLES_SHARE = 0.3  # of the steps, in which single interventions are learned alone


class DiffusionStage:
    """Trains the adapter, and the LoRAs or the backbone of its mode, on a pipeline with a context module.

    Every random number of a step is keyed by the step: a run that is resumed, or spread over several processes, gives
    the same result as a single-process, uninterrupted one.

    Args:
        accelerator: the processes and their precision.
        pipeline: what learns, see [`prepare_backbone`].
        batches: the images of this process.
        config: the run.
        max_train_steps: optimizer steps.
        learning_rate: the peak.
        unfreeze_step: the first step in which the backbone learns too; by default as the configuration says.
        encode_captions: what text encoders that do not learn make of captions; by default the pipeline's.
        trial: whether the exogenous noise earns its place, if that is in doubt.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: CompositionMixin,
        batches: Batches,
        config: TrainingConfig,
        max_train_steps: int,
        learning_rate: float,
        unfreeze_step: int | None = None,
        encode_captions: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
        trial: NoiseTrial | None = None,
    ):
        self.trial = trial
        self.accelerator, self.pipeline, self.config = accelerator, pipeline, config
        self.batches, self.max_train_steps = batches, max_train_steps
        self._conditioner, self._backbone = Conditioner.of(pipeline), backbone_of_pipeline(pipeline).model
        self.encode_captions = encode_captions or self._conditioner.encode_captions
        share = config.model.unfreeze_after or 0.0
        self.unfreeze_step = math.ceil(share * max_train_steps) if unfreeze_step is None else unfreeze_step
        self.text_encoders = learning_text_encoders(pipeline, config.model)
        self.step = 0
        """Optimizer steps that are done."""
        self._trial_steps = TRIAL_SHARE * max_train_steps
        self._prepare(learning_rate)

    def _prepare(self, learning_rate: float) -> None:
        """Hands what learns, the optimizer and the state of checkpoints to Accelerate."""
        options, model, backbone = self.config.optimization, self.config.model, self._backbone
        prepare_mode(backbone, model.mode, model.rank, self.text_encoders)
        cast_training_params([backbone, *self.text_encoders], torch.float32)
        caption_encoder = CaptionEncoder(self.pipeline) if self.text_encoders else None
        weight = 1.0 if options.composition_weight is None else options.composition_weight
        objective = DiffusionObjective(backbone, self.pipeline.scheduler, options.snr_gamma, caption_encoder, weight)
        self._module = objective.context_module
        learning = [p for part in split_parameters(backbone, self.text_encoders) for p in part]
        optimizer = create_optimizer(learning, options, learning_rate)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        # only now: where they are sharded, other parameters have taken their places
        adapter_parameters, self._backbone_parameters = split_parameters(backbone, self.text_encoders)
        self.parameters = adapter_parameters + self._backbone_parameters
        start_moments(self.optimizer)
        # not prepared: Accelerate would step it once per process
        self.schedule: Any = create_schedule(optimizer, options, self.max_train_steps)  # rates may be tensors
        self.ema = create_average(self.parameters, options)
        stateful = (self.schedule, self.ema, self.batches, self.trial)
        self.accelerator.register_for_checkpointing(*(part for part in stateful if hasattr(part, "state_dict")))
        register_trained_weights(self.accelerator)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint."""
        self.accelerator.load_state(str(checkpoint))
        self.step = checkpoint_step(checkpoint)
        if self.trial is not None and self.trial.goes_without:
            self._leave_out_noise()

    def run(self, save: Callable[[int], None], validate: Callable[[int], None], stop: StopSignals) -> None:
        """Trains to the last step.

        Args:
            save: writes a checkpoint of this step; called as often as the run asks for, before it stops, and last.
            validate: called as often as the run asks for, and last.
            stop: whether the run is asked to stop.

        Raises:
            FloatingPointError: if loss or gradients are not finite.
            SystemExit: if the run was asked to stop.
        """
        output = self.config.output
        if stop.requested():
            stop.end_run(f"after step {self.step}")
        show, total = self.accelerator.is_main_process, self.max_train_steps
        progress = tqdm(initial=self.step, total=total, desc="Training", disable=not show)
        for metrics in self.steps():
            progress.update()
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", lr=f"{metrics['lr']:.1e}")
            track_step(self.accelerator, metrics, self.step)
            stopping, last = stop.requested(), self.step == total
            if self.step % output.checkpointing_steps == 0 or last or stopping:
                save(self.step)  # first: what fails in validation must not take the steps with it
            if stopping and not last:
                stop.end_run(f"after step {self.step}")
            if self.step % output.validation_steps == 0 or last:
                validate(self.step)
        progress.close()

    def steps(self) -> Iterator[dict[str, float]]:
        """Takes the optimizer steps that are left; the metrics of each."""
        accumulation = self.config.optimization.gradient_accumulation_steps
        batches = self.batches.batches(self.step * accumulation)
        self.set_training(True)
        while self.step < self.max_train_steps:
            if self.trial is not None and self.trial.goes_without is None and self.step >= self._trial_steps:
                self._decide_noise(self.trial)
            loss = sum(self._learn_from(*next(batches)) for _ in range(accumulation)) / accumulation
            self.step += 1
            yield {"loss": loss, "lr": self.schedule.get_last_lr()[0], "gradient_norm": self._gradient_norm}

    @contextmanager
    def evaluating(self) -> Iterator[DiffusionObjective]:
        """The objective of the main process within the `with` block, with averaged weights if there are any."""
        self.set_training(False)
        try:
            with averaged(self.ema, self.parameters), self.accelerator.autocast():
                yield self.accelerator.unwrap_model(self.objective)
        finally:
            self.set_training(True)

    def finish(self) -> None:
        """Leaves the pipeline with the weights to save, whole on the main process and in single precision."""
        self.accelerator.wait_for_everyone()
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        self.set_training(False)
        self._backbone.float()
        gather_weights(self._backbone, self.accelerator)

    def set_training(self, training: bool) -> None:
        for model in (self._backbone, *self.text_encoders):
            model.train(training)

    def _learn_from(self, batch: Batch, random: KeyedNoise) -> float:
        """One batch; the mean loss of all processes."""
        accelerator = self.accelerator
        backbone_learns = self.step >= self.unfreeze_step
        # DDP waits for all the gradients that it found at first, also with a single process
        spread = accelerator.distributed_type != DistributedType.NO
        frozen = [] if backbone_learns or spread else self._backbone_parameters
        with accelerator.accumulate(self.objective):
            with gradients_off(frozen):
                inputs = send_to_device(self._inputs(batch, random), accelerator.device)
                with accelerator.autocast():
                    loss = self.objective(*inputs)
                mean_loss = accelerator.reduce(loss.detach().float(), "mean").item()
                self._check_finite("The loss", mean_loss)
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                if not backbone_learns:
                    for parameter in self._backbone_parameters:
                        parameter.grad = None
                norm = accelerator.clip_grad_norm_(self.parameters, self.config.optimization.max_grad_norm)
                self._gradient_norm = float(full_tensor(norm))
                if accelerator.scaler is None:  # which leaves such steps out by itself
                    self._check_finite("The norm of the gradients", self._gradient_norm)
            self.optimizer.step()
            # a gradient scaler's first steps, which find its scale, learn nothing
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.schedule.step()
                if self.ema is not None:
                    self.ema.step(self.parameters)
            self.optimizer.zero_grad()
        return mean_loss

    def _inputs(self, batch: Batch, random: KeyedNoise) -> tuple[Batch, Draws, dict[str, Any] | None]:
        """Arguments of the objective."""
        options, shape = self.config.optimization, batch.latents.shape
        noise = random.normal(*shape) + options.noise_offset * random.normal(*shape[:2], 1, 1)
        num_timesteps = self.pipeline.scheduler.config.num_train_timesteps
        timesteps = sample_timesteps(random.uniform(shape[0]), options.timestep_sampling, num_timesteps)
        draws = Draws(noise, timesteps, random.normal(shape[0], *self._module.noise_shape))
        dropped = random.uniform(shape[0]) < self.config.data.proportion_empty_prompts
        captions = ["" if drop else caption for caption, drop in zip(batch.captions, dropped)]
        batch = batch._replace(captions=captions)
        draws = draws._replace(combinations=self._combinations(batch, random))
        if self.trial is not None:
            draws = draws._replace(kept=self.trial.kept(shape[0], random))
        if self.text_encoders:  # which learn within the objective
            return batch, draws, None
        with torch.no_grad():
            return batch, draws, self._conditioner.model_kwargs(self.encode_captions(captions), batch.geometry)

    def _decide_noise(self, trial: NoiseTrial) -> None:
        """Leaves the noise out if held-out images do not confirm it, and says so."""
        conditions = self._conditioner.caption_kwargs  # not of a cache, which has the captions of training alone
        with self.evaluating() as objective:
            # on some devices, processes may differ in a sum's last digits
            gain, harm = broadcast_object_list([*trial.effects(objective, conditions, self.accelerator.device)])
        trial.goes_without = gain < CONFIRMED * harm
        if trial.goes_without:
            self._leave_out_noise()
            if self.accelerator.is_main_process:
                tqdm.write(
                    f"Held-out images do not confirm the exogenous noise: inferred from them, it lowers their loss by"
                    f" {gain:.4f}; other noise raises it by {harm:.4f}. So the adapter does without: images are what"
                    " prompt and interventions say. More images of each context may change that."
                )

    def _leave_out_noise(self) -> None:
        self._module.leave_out_noise(self._module.node_names)

    @property
    def _composes(self) -> bool:
        """Whether combinations are learned: by default where there is no exogenous noise."""
        weight = self.config.optimization.composition_weight
        if weight is not None:
            return weight > 0
        sharded = self.accelerator.distributed_type == DistributedType.FSDP  # see `check_accelerator`
        return not sharded and not self._module.has_noise.any()

    def _combinations(self, batch: Batch, random: KeyedNoise) -> torch.Tensor | None:
        """Combinations that some images of a batch are to learn, once the singles are known."""
        count, num_concepts = batch.mask.shape
        singles_alone = self.step < _SINGLES_SHARE * self.max_train_steps
        if singles_alone or num_concepts == 1 or not self._composes:
            return None
        chosen = random.uniform(count, 1) < COMPOSED_SHARE
        return chosen * draw_combinations(batch.mask, random.uniform(count, num_concepts + 1))

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {self.step}. Lower `learning_rate`, or use bf16 or no mixed precision."
            )


def count_steps(config: TrainingConfig, contexts: Sequence[str], global_batch_size: int) -> int:
    """Optimizer steps of a run on images of these contexts, with batches of `global_batch_size` over all processes.

    Raises:
        ValueError: if there are too few images for one step.
    """
    options = config.optimization
    if config.data.streaming and options.max_train_steps:
        return options.max_train_steps
    images = len(ContextBalancedSampler(contexts))
    batches = images // global_batch_size
    if not batches:
        raise ValueError(
            f"An epoch has {images} images, fewer than the {global_batch_size} of a step; lower `train_batch_size`."
        )
    steps = options.max_train_steps or options.num_train_epochs * batches // options.gradient_accumulation_steps
    if not steps:
        raise ValueError(
            f"{options.num_train_epochs} epochs of {batches} batches make no step of"
            f" {options.gradient_accumulation_steps} batches; raise `num_train_epochs` or set `max_train_steps`."
        )
    return steps
