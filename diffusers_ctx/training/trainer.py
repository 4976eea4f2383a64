"""Fine-tunes a diffusion pipeline with a context adapter: what the training scripts share."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import DistributedType, send_to_device, set_seed
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params
from huggingface_hub.constants import HF_HOME
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..adapter import set_context_scheduler
from ..adapter_format import RECORD_NAME
from ..context import ContextModule
from ..data import ContextBalancedSampler, concepts_of, context_mask
from ..data.held_out import hold_out
from ..data.streaming import ImageStream
from ..hub import create_repository, push_adapter_folder
from ..pipelines import CompositionMixin, Conditioner
from .checks import (
    check_accelerator,
    check_backbone,
    check_free_disk,
    check_options,
    check_validation_contexts,
)
from .concepts.caption_fit import fit_captions
from .concepts.stage import learn_concepts
from .config import TrainingConfig
from .diffusion.backbone import learning_text_encoders, prepare_backbone
from .diffusion.ema import averaged, create_average
from .diffusion.objective import CaptionEncoder, DiffusionObjective
from .diffusion.optimizer import check_optimizer, create_optimizer, create_schedule, warn_of_warm_up
from .diffusion.timesteps import sample_timesteps
from .diffusion.trainable import (
    count_learned,
    gradients_off,
    prepare_mode,
    schedule_options,
    split_parameters,
    with_unfreezing,
)
from .diffusion.validation import HELD_OUT_SEED, Validator
from .encoding.caption_cache import CaptionCache
from .encoding.latents import ContextLatents, ImageTransform, encode_images
from .encoding.posterior_features import create_image_features, with_posterior_encoder
from .encoding.streaming import StreamedBatches, open_images, take_concept_images
from .preparation import count_steps, create_context_module, describe_images, load_images
from .run.accelerator import create_accelerator
from .run.checkpoints import (
    checkpoint_step,
    choose_checkpoint,
    find_checkpoint,
    register_trained_weights,
    remove_unfinished,
    restore_unfreeze_step,
    save_checkpoint,
)
from .run.concept_checkpoint import ConceptProgress, remove_progress
from .run.files import check_writable, run_lock
from .run.keyed_noise import KeyedNoise
from .run.record import flatten_options, resume_contract, training_record
from .run.sharding import full_tensor, gather_weights, start_moments
from .run.stop_signals import StopSignals
from .run.tracking import start_trackers, track_step


logger = logging.getLogger(__name__)


class ContextTrainer:
    """Trains a context adapter on the UNet of `pipeline` and saves it.

    Everything random is keyed by seed, step and place in the global batch, so a run that is resumed, or spread over
    several processes, trains as one that is neither.

    Args:
        config: what to do.
        pipeline: the pretrained pipeline, in float32.

    Raises:
        ValueError, OSError: if data, concepts or options cannot work, or there is no way to write or push what will be
            learned. Nothing has been computed or written then.
        RuntimeError: if a tracker does not start. Nothing has been computed then.
    """

    def __init__(self, config: TrainingConfig, pipeline: CompositionMixin):
        check_backbone(pipeline)
        config = with_posterior_encoder(config, pipeline)
        check_options(config, pipeline.vae_scale_factor)
        self._image_features = create_image_features(config, pipeline)
        schedule = schedule_options(config.model, pipeline.scheduler)
        self.config = config = with_unfreezing(config, schedule)
        self.pipeline = pipeline
        self.output_dir = Path(config.output.output_dir)
        self.accelerator = create_accelerator(config)
        self.stop = StopSignals(self.accelerator)
        check_optimizer(config.optimization, self._learning_rate)
        check_accelerator(self.accelerator, config)
        set_seed(config.optimization.seed)
        self._images = open_images(config) if config.data.streaming else None
        found = self._load_dataset()
        dataset, held_out = self._split(found)
        self.context_module = self._create_context_module(
            config.data.concepts or concepts_of(dataset.unique("context"), config.data.obs_context)
        )
        if self.accelerator.is_main_process:
            print(describe_images(found, self.concepts), flush=True)
        check_validation_contexts(self._validation_contexts, self.concepts, config.data.obs_context)
        self.sampler = ContextBalancedSampler(dataset["context"], config.optimization.seed)
        self.max_train_steps = count_steps(config, len(self.sampler), self._global_batch_size)
        warn_of_warm_up(config.optimization, self.max_train_steps)
        self.options = resume_contract(
            config,
            self.accelerator,
            self.concepts,
            self._resolution,
            self.max_train_steps,
            dataset,
            [pipeline.unet, pipeline.vae, *pipeline.text_encoders.values()],
        )
        self.checkpoint = choose_checkpoint(
            self.output_dir, config.output.resume_from_checkpoint, self.max_train_steps, self.accelerator, self.options
        )
        if self.checkpoint is not None:
            restore_unfreeze_step(self.checkpoint, self.options)
        self.stream = None if self._images is None else self._stream_batches(self._images, dataset.unique("context"))
        check_writable(self.output_dir)
        prepare_backbone(pipeline, self.context_module, config.model, self.accelerator)
        if schedule:
            set_context_scheduler(pipeline, schedule)
        self._text_encoders = learning_text_encoders(pipeline, config.model)
        learned = count_learned(pipeline.unet, config.model.mode, config.model.rank, self._text_encoders)
        start = -1 if self.checkpoint is None else checkpoint_step(self.checkpoint)
        with ExitStack() as held:
            if self.accelerator.is_main_process:  # where it fails, the launcher ends the others
                held.enter_context(run_lock(self.output_dir))
            remove_unfinished(self.accelerator, self.output_dir)
            check_free_disk(self.output_dir, config, learned, pipeline, self.accelerator, start, self.max_train_steps)
            self.repo_id = self._create_repository()
            start_trackers(self.accelerator, self._tracked_options())  # last: what they refuse costs no computing
            self._encode_data(dataset, held_out)
            self._held = held.pop_all()  # until training ends

    @property
    def concepts(self) -> list[str]:
        return list(self.context_module.config.concepts)

    def train(self) -> Path:
        """Learns the concepts, then the adapter; saves it and, if asked, pushes it.

        Returns:
            The folder of the adapter.

        Raises:
            FloatingPointError: if loss or gradients are not finite; checkpoints and weights on disk are as they were.
        """
        with self._held:
            with self.stop:
                self._run(self._begin())
            self._save()
            self.accelerator.wait_for_everyone()  # launchers may end the others when one has come to its end
            self.accelerator.end_training()
        return self.output_dir

    def _begin(self) -> int:
        """Learns the concepts, which the first checkpoint holds, or takes up a checkpoint; the step to go on from."""
        if self.checkpoint is None:
            self._learn_concepts()
            self._prepare_training()
            self._save_checkpoint(0)
            step = 0
        else:
            self._prepare_training()
            self.accelerator.load_state(str(self.checkpoint))
            step = checkpoint_step(self.checkpoint)
        remove_progress(self.accelerator, self.output_dir)  # also where an earlier run died before it did
        return step

    def _learn_concepts(self) -> dict[str, float]:
        """The first part of training; its last figures."""
        progress = ConceptProgress(
            self.accelerator, self.output_dir, self.options, self.stop, self.config.output.checkpointing_steps
        )
        try:
            figures = learn_concepts(self.accelerator, self.context_module, self.latents, self.config, progress)
        except FloatingPointError:  # other options are needed, with which nothing of it can be taken up
            remove_progress(self.accelerator, self.output_dir)
            raise
        seed = self.config.optimization.seed
        fit_captions(self.accelerator, self.context_module, self.latents, self._encode_captions, seed)
        return figures

    # what is set up before training

    def _load_dataset(self) -> datasets.Dataset:
        if self._images is not None:
            return take_concept_images(self._images, self.config, self.accelerator.is_main_process)
        return load_images(self.config)

    def _split(self, dataset: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
        """Images to train on, and images to validate on."""
        rows = hold_out(dataset["context"], self.config.data.validation_images, HELD_OUT_SEED)
        return tuple(map(dataset.select, rows))

    def _create_context_module(self, concepts: list[str]) -> ContextModule:
        return create_context_module(self.config, self.pipeline, concepts, self._image_features, self._resolution)

    def _stream_batches(self, images: ImageStream, contexts: list[str]) -> StreamedBatches:
        stream = StreamedBatches(
            images, contexts, self.concepts, self.pipeline.vae, self._resolution, self.config, self.accelerator
        )
        if self.checkpoint is None:  # which has the place in the stream
            stream.check()
        return stream

    def _create_repository(self) -> str | None:
        """Full name of the repository to push to, which exists from here on: the token has proved good."""
        output = self.config.output
        if not (output.push_to_hub and self.accelerator.is_main_process):
            return None
        return create_repository(output.hub_model_id or self.output_dir.resolve().name, token=output.hub_token)

    def _encode_data(self, dataset: datasets.Dataset, held_out: datasets.Dataset) -> None:
        """All that is encoded before training, and the validation that uses it."""
        config, pipeline = self.config, self.pipeline
        self.latents = self._encode(dataset, config.optimization.seed)
        held_out_latents = self._encode(held_out, HELD_OUT_SEED) if len(held_out) else None
        self._image_features = None  # nobody asks for them again: a model of their own gives its memory back
        self._encode_captions = Conditioner.of(pipeline).encode_captions
        if config.data.cache_latents and not self._text_encoders:
            self._encode_captions = CaptionCache(
                pipeline, {"", *self.latents.captions}, self._cache_dir, not self.accelerator.is_local_main_process
            )
        self.validator = Validator(config, pipeline, held_out_latents, self.accelerator, self.stop)

    def _encode(self, dataset: datasets.Dataset, seed: int) -> ContextLatents:
        """Latents of images, whose places of random crops have this seed."""
        data = self.config.data
        return encode_images(
            self.pipeline.vae,
            dataset,
            context_mask(list(dataset["context"]), self.concepts, data.obs_context),
            ImageTransform(self._resolution, data.center_crop, seed),
            random_flip=data.random_flip,
            cache_dir=self._cache_dir if data.cache_latents else None,
            wait_for_other_process=not self.accelerator.is_local_main_process,
            show_progress=self.accelerator.is_main_process,
            image_features=self._image_features,
            num_workers=data.dataloader_num_workers,
        )

    def _prepare_training(self) -> None:
        """What learns, optimizer, schedule and data, handed to Accelerate."""
        options, unet = self.config.optimization, self.pipeline.unet
        prepare_mode(unet, self.config.model.mode, self.config.model.rank, self._text_encoders)
        cast_training_params([unet, *self._text_encoders], torch.float32)
        scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        caption_encoder = CaptionEncoder(self.pipeline) if self._text_encoders else None
        objective = DiffusionObjective(unet, self.context_module, scheduler, options.snr_gamma, caption_encoder)
        learning = [p for part in split_parameters(unet, self._text_encoders) for p in part]
        optimizer = create_optimizer(learning, options, self._learning_rate)
        loader = None
        if self.stream is None:
            loader = DataLoader(
                self.latents, sampler=self.sampler, batch_size=options.train_batch_size, drop_last=True
            )
        self.objective, self.optimizer, self.loader = self.accelerator.prepare(objective, optimizer, loader)
        # only now: where they are sharded, other parameters have taken their places
        adapter_parameters, self._backbone_parameters = split_parameters(unet, self._text_encoders)
        self._learning = adapter_parameters + self._backbone_parameters
        start_moments(self.optimizer)
        # not prepared: Accelerate would step it once per process
        self.schedule: Any = create_schedule(optimizer, options, self.max_train_steps)  # rates may be tensors
        self.accelerator.register_for_checkpointing(self.schedule)
        self.ema = create_average(self._learning, options)
        if self.ema is not None:
            self.accelerator.register_for_checkpointing(self.ema)
        if self.stream is not None:
            self.accelerator.register_for_checkpointing(self.stream)
        register_trained_weights(self.accelerator)

    @property
    def _cache_dir(self) -> Path:
        return Path(self.config.data.cache_dir or HF_HOME) / "context-latents"

    @property
    def _resolution(self) -> int:
        return self.config.data.resolution or self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def _validation_contexts(self) -> list[str]:
        """The compositions to validate beside the single contexts."""
        return self.config.output.validation_interventions or []

    @property
    def _global_batch_size(self) -> int:
        return self.config.optimization.train_batch_size * self.accelerator.num_processes

    @property
    def _learning_rate(self) -> float:
        """The peak."""
        options = self.config.optimization
        scale = self._global_batch_size * options.gradient_accumulation_steps if options.scale_lr else 1
        return options.learning_rate * scale

    # training

    def _run(self, step: int) -> None:
        accumulation = self.config.optimization.gradient_accumulation_steps
        output = self.config.output
        if self.stop.requested():
            self.stop.end_run(f"after step {step}")
        progress = tqdm(
            initial=step,
            total=self.max_train_steps,
            desc="Training",
            disable=not self.accelerator.is_main_process,
        )
        batches = self._batches(step * accumulation)
        self._set_training(True)
        while step < self.max_train_steps:
            loss = sum(self._train_on(*next(batches), step) for _ in range(accumulation)) / accumulation
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{self.schedule.get_last_lr()[0]:.1e}")
            figures = {"loss": loss, "lr": self.schedule.get_last_lr()[0], "gradient_norm": self._gradient_norm}
            track_step(self.accelerator, figures, step)
            stopping, last = self.stop.requested(), step == self.max_train_steps
            if step % output.checkpointing_steps == 0 or last or stopping:
                self._save_checkpoint(step)  # first: what fails in validation must not take the steps with it
            if stopping and not last:
                self.stop.end_run(f"after step {step}")
            if step % output.validation_steps == 0 or last:
                self._validate(step)
        progress.close()

    def _save_checkpoint(self, step: int) -> None:
        limit = self.config.output.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, step, self.options, limit)

    def _batches(self, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbered batches of this process, endlessly, from number `start` of the whole run."""
        if self.stream is not None:
            yield from self.stream.batches(start)
            return
        epoch, skipped = divmod(start, len(self.loader))
        number = start
        while True:
            self.loader.set_epoch(epoch)
            loader = self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader
            for batch in loader:
                yield number, batch
                number += 1
            epoch, skipped = epoch + 1, 0

    def _train_on(self, number: int, batch: dict[str, Any], step: int) -> float:
        """One batch; the mean loss of all processes."""
        accelerator = self.accelerator
        backbone_learns = step >= self.options["unfreeze_step"]
        # DDP waits for all the gradients that it found at first, also with a single process
        spread = accelerator.distributed_type != DistributedType.NO
        frozen = [] if backbone_learns or spread else self._backbone_parameters
        with accelerator.accumulate(self.objective):
            with gradients_off(frozen):
                inputs = self._step_inputs(number, batch)
                with accelerator.autocast():
                    loss = self.objective(*inputs)
                mean_loss = accelerator.reduce(loss.detach().float(), "mean").item()
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"The loss is {mean_loss} at step {step}. Lower `learning_rate`, or use bf16 or no mixed"
                        f" precision; {self._last_checkpoint()}."
                    )
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                if not backbone_learns:
                    for parameter in self._backbone_parameters:
                        parameter.grad = None
                norm = accelerator.clip_grad_norm_(self._learning, self.config.optimization.max_grad_norm)
                self._gradient_norm = float(full_tensor(norm))
                # a gradient scaler leaves such steps out by itself
                if accelerator.scaler is None and not math.isfinite(self._gradient_norm):
                    raise FloatingPointError(
                        f"Gradients are not finite at step {step}. Lower `learning_rate`; {self._last_checkpoint()}."
                    )
            self.optimizer.step()
            # a gradient scaler's first steps, which find its scale, learn nothing
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                self.schedule.step()
                if self.ema is not None:
                    self.ema.step(self._learning)
            self.optimizer.zero_grad()
        return mean_loss

    def _step_inputs(self, number: int, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments of the objective for a batch, on the device."""
        options, device = self.config.optimization, self.accelerator.device
        indices = batch["index"].cpu()
        size, shape = len(indices), self.latents.mean.shape[2:]
        images = batch.get("images", self.latents)
        random = KeyedNoise(options.seed, number, self.accelerator.process_index, self.accelerator.num_processes)
        first, flip = random.normal(size, *shape), random.uniform(size)
        latents, geometry = images.draw(indices, first, flip), images.geometry_of(indices, flip)
        noise = random.normal(size, *shape) + options.noise_offset * random.normal(size, shape[0], 1, 1)
        timesteps = sample_timesteps(
            random.uniform(size), options.timestep_sampling, self.pipeline.scheduler.config.num_train_timesteps
        )
        eps = random.normal(size, *self.context_module.noise_shape)
        dropped = random.uniform(size) < self.config.data.proportion_empty_prompts
        captions = ["" if drop else caption for caption, drop in zip(batch["caption"], dropped)]
        conditions: dict[str, Any] = {"captions": captions, "geometry": geometry}
        if not self._text_encoders:  # those that learn encode within the objective
            with torch.no_grad():
                conditions = Conditioner.of(self.pipeline).unet_kwargs(self._encode_captions(captions), geometry)
        features = self.latents.features_of(indices, flip)
        return send_to_device((latents, batch["mask"], conditions, noise, timesteps, eps, features), device)

    def _validate(self, step: int) -> None:
        """On the main process, with averaged weights if there are any."""
        if not self.validator.has_work:
            return
        if self.accelerator.is_main_process:
            self._set_training(False)
            with averaged(self.ema, self._learning), self.accelerator.autocast():
                self.validator(self.accelerator.unwrap_model(self.objective), step)
            self._set_training(True)
        self.accelerator.wait_for_everyone()

    def _set_training(self, training: bool) -> None:
        for model in (self.pipeline.unet, *self._text_encoders):
            model.train(training)

    # afterwards

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.ema is not None:
            self.ema.copy_to(self._learning)
        self._set_training(False)
        self.pipeline.unet.float()
        gather_weights(self.pipeline.unet, self.accelerator)
        if not self.accelerator.is_main_process:
            return
        mode = self.config.model.mode
        steps, images = self.max_train_steps, len(self.latents)
        record = training_record(self.config, self.accelerator, steps, images, self._resolution)
        self.pipeline.save_context_adapter(
            self.output_dir, mode=mode, card={"repo_id": self.repo_id, "training": record}
        )
        if mode == "full":  # the adapter belongs to the UNet that learned with it
            self.pipeline.save_pretrained(self.output_dir)
        (self.output_dir / RECORD_NAME).write_text(json.dumps(flatten_options(self.config), indent=2) + "\n")
        if self.repo_id is not None:
            push_adapter_folder(self.output_dir, self.repo_id, token=self.config.output.hub_token)

    def _tracked_options(self) -> dict[str, Any]:
        """Every option, as trackers take them."""
        return {
            name: value if isinstance(value, str | int | float | bool) else json.dumps(value)
            for name, value in flatten_options(self.config).items()
        }

    def _last_checkpoint(self) -> str:
        return f"the last checkpoint is {find_checkpoint(self.output_dir, 'latest') or self.checkpoint}"
