"""Fine-tunes a diffusion pipeline with a context adapter: what the training scripts share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..adapter import backbone_of_pipeline, native_resolution, set_context_scheduler
from ..context import ContextModule
from ..data import concepts_of, context_mask
from ..data.held_out import hold_out
from ..hub import create_repository, push_adapter_folder
from ..pipelines import CompositionMixin, Conditioner, truncation_unsaid
from .checks import check_accelerator, check_backbone, check_options, check_validation_contexts
from .concepts.module import create_context_module
from .concepts.stage import ConceptStage
from .config import TrainingConfig
from .diffusion.noise_schedule import schedule_options, with_unfreezing
from .diffusion.noise_trial import NoiseTrial, can_try_noise, trial_images
from .diffusion.optimizer import check_optimizer, warn_of_warm_up
from .diffusion.stage import DiffusionStage, count_steps
from .diffusion.trainable import count_learned, learning_text_encoders, prepare_backbone, with_injection
from .diffusion.validation import HELD_OUT_SEED, Validator
from .encoding.batch import Batches
from .encoding.caption_cache import create_caption_encoder
from .encoding.images import ImageTransform, describe_images, load_images, warn_of_long_captions
from .encoding.latents import ContextLatents, LatentBatches, encode_images
from .encoding.posterior_features import create_image_features, with_posterior_encoder
from .encoding.streaming import StreamedBatches, open_images, take_concept_images
from .run.accelerator import create_accelerator
from .run.checkpoints import (
    checkpoint_step,
    choose_checkpoint,
    find_checkpoint,
    remove_unfinished,
    restore_unfreeze_step,
    save_checkpoint,
)
from .run.concept_checkpoint import ConceptCheckpoint
from .run.disk_space import check_free_disk
from .run.files import check_writable, run_lock
from .run.record import resume_contract, tracked_options, training_record, write_options
from .run.stop_signals import StopSignals
from .run.tracking import start_trackers


class ContextTrainer:
    """Trains a context adapter on `pipeline` and saves it.

    Every random number is keyed by seed, step and place in the global batch: a run that is resumed, or spread over
    several processes, gives the same result as a single-process, uninterrupted one.

    Args:
        config: the run.
        pipeline: the pretrained pipeline, in float32.
    """

    config: TrainingConfig
    accelerator: Accelerator
    stop: StopSignals
    context_module: ContextModule
    latents: ContextLatents
    validator: Validator
    adapter_stage: DiffusionStage

    def __init__(self, config: TrainingConfig, pipeline: CompositionMixin):
        self.config = config
        self.pipeline = pipeline
        self.output_dir = Path(config.output.output_dir)
        self.checkpoint: Path | None = None
        self.repo_id: str | None = None

    def train(self) -> Path:
        """Runs the whole training.

        Returns:
            The folder of the adapter.

        Raises:
            ValueError, OSError, RuntimeError: as `load` and `open`, before anything is computed.
            FloatingPointError: if loss or gradients are not finite; checkpoints and weights on disk are as they were.
            SystemExit: if the run was asked to stop; it can be resumed.
        """
        self.load()
        with self.open():
            self.encode()
            with self.stop:
                self.learn_concepts()
                self.learn_adapter()
            self.save()
            self.push()
        return self.output_dir

    def load(self) -> None:
        """Reads the data and checks everything that could stop the run later. Nothing is encoded or trained.

        Raises:
            ValueError, OSError: if data, concepts or options cannot work, or the output folder cannot be written to.
        """
        pipeline = self.pipeline
        check_backbone(pipeline)
        config = with_injection(with_posterior_encoder(self.config, pipeline), pipeline)
        check_options(config, self.resolution, pipeline)
        self._image_features = create_image_features(config, pipeline)
        self._schedule = schedule_options(config.model, pipeline)
        self.config = config = with_unfreezing(config, self._schedule)
        self.accelerator = create_accelerator(config)
        self.stop = StopSignals(self.accelerator)
        check_optimizer(config.optimization, self.learning_rate)
        check_accelerator(self.accelerator, config)
        set_seed(config.optimization.seed)
        self._load_images()
        self._choose_checkpoint()
        if config.data.streaming:
            self.batches = self._stream_batches()
        check_writable(self.output_dir)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Makes the pipeline ready and holds the output folder for this run within the `with` block.

        Raises:
            OSError: if another run trains in the folder, or its disk is too full.
            PermissionError, ConnectionError: if the adapter could not be pushed in the end.
            RuntimeError: if a tracker does not start.
        """
        config, pipeline = self.config, self.pipeline
        prepare_backbone(pipeline, self.context_module, config.model, self.accelerator)
        if self._schedule:
            set_context_scheduler(pipeline, self._schedule)
        with ExitStack() as held:
            held.enter_context(truncation_unsaid(pipeline))  # which `load` has said once
            if self.accelerator.is_main_process:  # where it fails, the launcher ends the others
                held.enter_context(run_lock(self.output_dir))
            remove_unfinished(self.accelerator, self.output_dir)
            self._check_free_disk()
            self.repo_id = self._create_repository()
            start_trackers(self.accelerator, tracked_options(config))  # last: what they refuse costs no computing
            every = config.output.checkpointing_steps
            self._concept_checkpoint = ConceptCheckpoint(
                self.accelerator, self.output_dir, self.contract, self.stop, every
            )
            yield
            self.accelerator.wait_for_everyone()  # launchers may end the others when one has ended
            self.accelerator.end_training()

    def encode(self) -> None:
        """Encodes images and captions."""
        config, pipeline = self.config, self.pipeline
        self.latents = self._encode(self._train_images, config.optimization.seed)
        has_held_out = len(self._held_out_images) > 0
        self._held_out = self._encode(self._held_out_images, HELD_OUT_SEED) if has_held_out else None
        self._trial = None
        if self._held_out is not None and self._tries_noise:
            self._trial = NoiseTrial(self._held_out, config.optimization.train_batch_size, config.optimization.seed)
        self._image_features = None  # not needed again: a model of their own gives its memory back
        if not config.data.streaming:
            share = (self.accelerator.process_index, self.accelerator.num_processes)
            optimization = config.optimization
            self.batches = LatentBatches(self.latents, optimization.train_batch_size, optimization.seed, *share)
        self._encode_captions = create_caption_encoder(
            config, pipeline, self.latents.captions, not self.accelerator.is_local_main_process
        )
        self.validator = Validator(
            config, pipeline, self._held_out if config.data.validation_images else None, self.accelerator, self.stop
        )

    def learn_concepts(self) -> None:
        """The first stage; a run that resumes from a checkpoint has it behind it."""
        if self.checkpoint is not None:
            return
        stage = ConceptStage(
            self.accelerator,
            self.context_module,
            self.latents,
            self.config.context,
            self.config.optimization.seed,
            self._concept_checkpoint,
            self._encode_captions,
            self._held_out,
        )
        try:
            stage.run()
        except FloatingPointError:  # other options are needed, with which nothing of it can be resumed
            self._concept_checkpoint.remove()
            raise

    def learn_adapter(self) -> None:
        """The second stage, from the checkpoint if there is one."""
        self.adapter_stage = DiffusionStage(
            self.accelerator,
            self.pipeline,
            self.batches,
            self.config,
            self.max_train_steps,
            self.learning_rate,
            self.contract["unfreeze_step"],
            self._encode_captions,
            self._trial,
        )
        if self.checkpoint is None:
            self._save_checkpoint(0)
        else:
            self.adapter_stage.load(self.checkpoint)
        self._concept_checkpoint.remove()  # also where an earlier run died before it did
        try:
            self.adapter_stage.run(self._save_checkpoint, self.validate, self.stop)
        except FloatingPointError as error:
            last = find_checkpoint(self.output_dir, "latest") or self.checkpoint
            raise FloatingPointError(f"{error} The last checkpoint is {last}.") from error

    def validate(self, step: int) -> None:
        """Logs held-out losses and samples on the main process."""
        if not self.validator.has_work:
            return
        if self.accelerator.is_main_process:
            with self.adapter_stage.evaluating() as objective:
                self.validator(objective, step)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Writes the adapter, its model card and the options of the run; in mode full, the pipeline too."""
        self.adapter_stage.finish()
        if not self.accelerator.is_main_process:
            return
        mode, images = self.config.model.mode, len(self.latents)
        record = training_record(self.config, self.accelerator, self.max_train_steps, images, self.resolution)
        card = {"repo_id": self.repo_id, "training": record}
        self.pipeline.save_context_adapter(self.output_dir, mode=mode, card=card)
        if mode == "full":  # the adapter belongs to the backbone that learned with it
            self.pipeline.save_pretrained(self.output_dir)
        write_options(self.config, self.output_dir)

    def push(self) -> None:
        """Pushes the adapter to the Hub, if the run asks for it."""
        if self.repo_id is not None:
            push_adapter_folder(self.output_dir, self.repo_id, token=self.config.output.hub_token)

    @property
    def concepts(self) -> list[str]:
        return list(self.context_module.config.concepts)

    @property
    def resolution(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.data.resolution or native_resolution(self.pipeline)

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return self.config.optimization.peak_learning_rate(self._global_batch_size)

    @property
    def _global_batch_size(self) -> int:
        return self.config.optimization.train_batch_size * self.accelerator.num_processes

    def _load_images(self) -> None:
        data, is_main = self.config.data, self.accelerator.is_main_process
        if data.streaming:
            self._stream = open_images(self.config)
            images = take_concept_images(self._stream, self.config, is_main)
        else:
            images = load_images(self.config)
        on_trial = trial_images(images["context"]) if can_try_noise(self.accelerator, self.config) else 0
        self._tries_noise = on_trial > 0
        rows = hold_out(images["context"], data.validation_images or on_trial, HELD_OUT_SEED)
        self._train_images, self._held_out_images = map(images.select, rows)
        concepts = data.concepts or concepts_of(self._train_images.unique("context"), data.obs_context)
        self.context_module = create_context_module(
            self.config, self.pipeline, concepts, self._image_features, self.resolution
        )
        if is_main:
            print(describe_images(images, concepts), flush=True)
            warn_of_long_captions(self.pipeline, list(images["text"]), self.config)
        check_validation_contexts(self.config.output.validation_interventions or [], concepts, data.obs_context)
        self.max_train_steps = count_steps(self.config, self._train_images["context"], self._global_batch_size)
        warn_of_warm_up(self.config.optimization, self.max_train_steps)

    def _choose_checkpoint(self) -> None:
        pipeline = self.pipeline
        self.contract = resume_contract(
            self.config,
            self.accelerator,
            self.concepts,
            self.resolution,
            self.max_train_steps,
            self._train_images,
            [backbone_of_pipeline(pipeline).model, pipeline.vae, *Conditioner.of(pipeline).text_encoders.values()],
        )
        name = self.config.output.resume_from_checkpoint
        self.checkpoint = choose_checkpoint(
            self.output_dir, name, self.max_train_steps, self.accelerator, self.contract
        )
        if self.checkpoint is not None:
            restore_unfreeze_step(self.checkpoint, self.contract)

    def _stream_batches(self) -> Batches:
        stream = StreamedBatches(
            self._stream,
            self._train_images.unique("context"),
            self.concepts,
            self.pipeline.vae,
            self.resolution,
            self.config,
            self.accelerator,
        )
        if self.checkpoint is None:  # which has the place in the stream
            stream.check()
        return stream

    def _encode(self, images: datasets.Dataset, seed: int) -> ContextLatents:
        """Latents of images, whose places of random crops have this seed."""
        data = self.config.data
        return encode_images(
            self.pipeline.vae,
            images,
            context_mask(list(images["context"]), self.concepts, data.obs_context),
            ImageTransform(self.resolution, data.center_crop, seed),
            random_flip=data.random_flip,
            cache_dir=data.encoding_dir,
            wait_for_other_process=not self.accelerator.is_local_main_process,
            show_progress=self.accelerator.is_main_process,
            image_features=self._image_features,
            num_workers=data.dataloader_num_workers,
        )

    def _check_free_disk(self) -> None:
        model, text_encoders = self.config.model, learning_text_encoders(self.pipeline, self.config.model)
        learned = count_learned(backbone_of_pipeline(self.pipeline).model, model.mode, model.rank, text_encoders)
        left = self.max_train_steps - (0 if self.checkpoint is None else checkpoint_step(self.checkpoint))
        check_free_disk(self.output_dir, self.config, learned, self.pipeline, self.accelerator, left)

    def _create_repository(self) -> str | None:
        """Full name of the repository to push to, which exists from here on: the token has proved good."""
        output = self.config.output
        if not (output.push_to_hub and self.accelerator.is_main_process):
            return None
        return create_repository(output.hub_model_id or self.output_dir.resolve().name, token=output.hub_token)

    def _save_checkpoint(self, step: int) -> None:
        limit = self.config.output.checkpoints_total_limit
        save_checkpoint(self.accelerator, self.output_dir, step, self.contract, limit)
