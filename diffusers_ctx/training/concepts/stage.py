"""The first stage of training: the concepts are learned, with a light decoder instead of the backbone.

Most of a diffusion loss does not depend on the context, and the signal of the contexts drowns in it. A light decoder
sees little else, and its steps are cheap. With an inverse posterior, three parts come before all terms are minimized
together:

1. a plain VAE, which knows no contexts, learns a code that keeps all of the image;
2. a normalizing flow from that code to node values is learned from what contexts differ in, together with mechanisms
   and causal layer (`search.py`), which are refitted to the values (`scm_fit.py`);
3. the posterior learns to read those values, and the decoder to decode them.

Last, the module learns which captions go with which values (`caption_fit.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ...context import ContextModule, GaussianPosterior
from ...data import ContextBalancedSampler
from ..config import ContextConfig
from ..encoding.batch import Batch
from ..encoding.latents import ContextLatents
from ..run.accelerator import broadcast_weights
from ..run.concept_checkpoint import ConceptCheckpoint, Stateful
from ..run.keyed_noise import KeyedNoise
from ..run.tracking import track_concepts
from .caption_fit import fit_captions
from .codes import read_codes
from .held_out import held_out_contrast
from .losses import unit_directions
from .objective import ConceptObjective
from .search import ImageCodes, search_flow


logger = logging.getLogger(__name__)

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]  # and metrics to track

_COLLAPSED = 0.1  # nats; a concept that was found has some three
_LATENT_DIRECTIONS = 128
# shares of the steps; the rest minimizes all terms
_CODE_SHARE = 0.3
_READING_SHARE = 0.1
_READING_WEIGHT = 20.0
_MECHANISMS_RATE = 10  # mechanisms must keep pace with values whose scale the encoder sets
_TRACKED_STEPS = 10
_HELD_OUT_STEPS = 50  # after which held-out images are read, all of them


class Part(Enum):
    """The parts of the stage, in order, by the titles of their progress bars."""

    CODE = "Learning a code of images"
    SEARCH = "Telling concepts apart"
    READING = "Reading concepts"
    ALL = "Learning concepts"


class ConceptStage:
    """Learns mechanisms, causal layer and posterior, and what captions say; the read-out learns later.

    Every process takes the same steps and then the main process's weights: the steps are cheap, and their terms
    compare images within the batch, which must not be torn apart.

    Args:
        accelerator: has the device.
        context_module: what learns.
        latents: the images.
        options: steps, rates and weights of the terms.
        seed: the run's seed.
        checkpoint: saves what has been learned, and resumes from it, if the stage can be interrupted.
        encode_captions: what text encoders make of captions, see [`~pipelines.Conditioner.encode_captions`]; without
            it, captions are not learned.
        held_out: images that trackers hear of and nothing learns from, if there are any.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        context_module: ContextModule,
        latents: ContextLatents,
        options: ContextConfig,
        seed: int,
        checkpoint: ConceptCheckpoint | None = None,
        encode_captions: Callable[[list[str]], dict[str, torch.Tensor]] | None = None,
        held_out: ContextLatents | None = None,
    ):
        self.accelerator, self.module, self.latents = accelerator, context_module, latents
        self._steps = options.concept_steps_for(latents.contexts)
        self.options = replace(options, concept_steps=self._steps)
        self.seed = seed
        self.checkpoint, self.encode_captions, self.held_out = checkpoint, encode_captions, held_out
        self.show_progress = accelerator.is_main_process
        contexts, self.labels = latents.masks.unique(dim=0, return_inverse=True)
        channels, size = latents.mean.shape[2], latents.mean.shape[-1]
        self.objective = ConceptObjective(context_module, contexts, channels, size, options).to(accelerator.device)
        self._rows = balanced_rows(latents.contexts, self.labels, seed, options.concept_batch_size)
        self._steps_done = 0

    def run(self) -> dict[str, float]:
        """Learns everything.

        Returns:
            The last step's metrics, among them `kl/<name>` for each node, in nats.

        Raises:
            FloatingPointError: if the loss is not finite.
            SystemExit: if the run was asked to stop.
        """
        self.module.requires_grad_(True).read_out.requires_grad_(False)
        if self.latents.features is not None:
            self.module.encoder.fit(self.latents.features.flatten(0, 1))
        steps = self._steps
        if self.options.posterior_type == "inverse":
            code_steps, reading_steps = round(_CODE_SHARE * steps), round(_READING_SHARE * steps)
            self._learn_code(code_steps)
            self._learn_reading(self._find_values(), reading_steps)
            steps -= code_steps + reading_steps
        metrics = self._learn_all(steps)
        broadcast_weights(self.module)
        if self.accelerator.is_main_process:
            _warn_of_collapse({name: metrics[f"kl/{name}"] for name in self.module.config.concepts})
        if self.encode_captions is not None:
            fit_captions(self.accelerator, self.module, self.latents, self.encode_captions, self.seed)
        return metrics

    def _learn_code(self, steps: int) -> None:
        """Trains encoder and head as those of a plain VAE."""
        objective = self.objective
        decoder = objective.create_code_decoder().to(self.accelerator.device)

        def loss(batch: Batch, labels: torch.Tensor, rows: torch.Tensor, random: KeyedNoise, step: int) -> Loss:
            posterior = GaussianPosterior.diagonal(*self.module.read_code(batch.posterior_input))
            code = posterior.at(self._normal(random, len(rows), *self.module.noise_shape))
            kl = posterior.kl().sum(dim=1).mean()
            mse = F.mse_loss(decoder(code), objective.targets(batch.latents))
            value = objective.likelihood_loss(mse) + self._warm_up(step) * self.options.kl_weight * kl
            return value, {"code/reconstruction": mse, "code/kl": kl}

        groups = [{"params": [*self._reading_parameters(), *decoder.parameters()]}]
        self._minimize(loss, groups, steps, Part.CODE, decoder=decoder)

    def _find_values(self) -> torch.Tensor:
        """Learns mechanisms, causal layer and a flow to node values; returns those of the images, (n, N, d)."""
        checkpoint, name = self.checkpoint, Part.SEARCH.name
        if checkpoint is not None:
            if checkpoint.resume(name, objective=self.objective) > 0:
                assert checkpoint.values is not None
                return checkpoint.values
            checkpoint.maybe_save(name, 0, objective=self.objective)
        values = search_flow(
            self.module,
            self._codes(),
            self.objective.contexts,
            self.options,
            self.seed,
            self.show_progress,
            before_step=checkpoint.check_stop if checkpoint is not None else lambda: None,
        )
        if checkpoint is not None:
            checkpoint.values = values
        return values

    def _learn_reading(self, values: torch.Tensor, steps: int) -> None:
        """Trains encoder and head to read these node values (n, N, d), and the decoder to decode them."""
        objective = self.objective

        def loss(batch: Batch, labels: torch.Tensor, rows: torch.Tensor, random: KeyedNoise, step: int) -> Loss:
            aims = values[rows].to(self.accelerator.device)
            mse = F.mse_loss(objective.decoder(aims), objective.targets(batch.latents))
            error = F.mse_loss(self.module.read_values(batch.posterior_input), aims)
            value = objective.likelihood_loss(mse) + _READING_WEIGHT * error
            return value, {"reading/reconstruction": mse, "reading/error": error}

        parameters = [*self._reading_parameters(), *objective.decoder.parameters()]
        self._minimize(loss, [{"params": parameters}], steps, Part.READING)

    def _learn_all(self, steps: int) -> dict[str, float]:
        """Minimizes all terms; the last step's metrics."""
        mechanisms = [*self.module.mechanism.parameters(), *self.module.causal.parameters()]
        known = {id(parameter) for parameter in mechanisms}
        others = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in known]
        learning_rate = _MECHANISMS_RATE * self.options.concept_learning_rate
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": mechanisms, "weight_decay": 0.0, "lr": learning_rate},
        ]
        shape, device = self.module.noise_shape, self.accelerator.device

        def loss(batch: Batch, labels: torch.Tensor, rows: torch.Tensor, random: KeyedNoise, step: int) -> Loss:
            eps, reference = self._normal(random, len(rows), *shape), self._normal(random, len(rows), *shape)
            directions = unit_directions(random, reference[0].numel()).to(device)
            latent_directions = unit_directions(random, self.objective.dimensions, _LATENT_DIRECTIONS).to(device)
            draws = (eps, reference, directions, latent_directions)
            return self.objective(batch.latents, labels, *draws, self._warm_up(step), batch.features)

        return self._numbers(self._minimize(loss, groups, steps, Part.ALL))

    def _minimize(
        self,
        loss_of: Callable[[Batch, torch.Tensor, torch.Tensor, KeyedNoise, int], Loss],
        groups: list[dict[str, Any]],
        steps: int,
        part: Part,
        **parts: Stateful,
    ) -> dict[str, torch.Tensor]:
        """Steps of AdamW on `loss_of(batch, labels, rows, random, step)`, without those that an earlier run has done;
        the last step's metrics.

        `parts` have a state besides the objective's.
        """
        metrics: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.AdamW(groups, lr=self.options.concept_learning_rate, weight_decay=1e-4)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts |= {"objective": self.objective, "optimizer": optimizer, "schedule": schedule}
        done = 0
        if self.checkpoint is not None:
            done = int(min(steps, self.checkpoint.resume(part.name, **parts)))
        self._skip(done)
        for step in tqdm(range(done, steps), part.value, steps, initial=done, disable=not self.show_progress):
            if self.checkpoint is not None:
                self.checkpoint.maybe_save(part.name, step, **parts)
            rows = next(self._rows)
            random = KeyedNoise(self.seed, "concepts", self._steps_done)
            inputs = (self.latents.batch(rows, random), self.labels[rows])
            batch, labels = send_to_device(inputs, self.accelerator.device)
            loss, metrics = loss_of(batch, labels, rows, random, step)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"The loss is not finite at step {step} of learning the concepts; lower `concept_learning_rate`."
                )
            loss.backward()
            # the ELBO is a sum over dimensions, and so are its gradients
            torch.nn.utils.clip_grad_norm_(parameters, 50.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self._steps_done += 1
            is_last = step == steps - 1
            if self.accelerator.trackers and (self._steps_done % _TRACKED_STEPS == 0 or is_last):
                track_concepts(self.accelerator, self._numbers(metrics), self._steps_done)
            if self.accelerator.trackers and (self._steps_done % _HELD_OUT_STEPS == 0 or is_last):
                self._track_held_out(part)
        return metrics

    def _track_held_out(self, part: Part) -> None:
        """Tells trackers the contrast of held-out images, once there are values that can be read off images."""
        if self.held_out is None or part is Part.CODE or self.options.posterior_type != "inverse":
            return
        contrast = held_out_contrast(self.module, self.held_out)
        metrics = {f"held_out_contrast/{name}": nats.item() for name, nats in contrast.items()}
        track_concepts(self.accelerator, metrics, self._steps_done)

    def _skip(self, steps: int) -> None:
        for _ in range(steps):
            next(self._rows)
        self._steps_done += steps

    def _numbers(self, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics by name; `kl`, which has one for each node, as `kl/<name>`."""
        named = {name: metric for name, metric in metrics.items() if name != "kl"}
        if "kl" in metrics:
            named |= {f"kl/{name}": metric for name, metric in zip(self.module.node_names, metrics["kl"])}
        values = torch.stack([metric.detach() for metric in named.values()]).tolist()  # one wait for the device
        return dict(zip(named, values))

    def _codes(self) -> ImageCodes:
        mean, log_variance = (code.flatten(1).cpu() for code in read_codes(self.module, self.latents))
        return ImageCodes(mean, (log_variance / 2).exp(), self.labels)

    def _reading_parameters(self) -> list[torch.nn.Parameter]:
        return [*self.module.encoder.parameters(), *self.module.head.parameters()]

    def _warm_up(self, step: int) -> float:
        return min(1.0, (step + 1) / self.options.kl_warmup_steps)

    def _normal(self, random: KeyedNoise, *shape: int) -> torch.Tensor:
        return random.normal(*shape).to(self.accelerator.device)


def balanced_rows(contexts: list[str], labels: torch.Tensor, seed: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches of rows without end, equally many of every context and sorted by it.

    They have at least `batch_size` rows, or those of an epoch if it has fewer: in larger ones, images would repeat.
    """
    sampler = ContextBalancedSampler(contexts, seed)
    batch_size = min(batch_size, len(sampler))
    batch_size = -(-batch_size // sampler.num_contexts) * sampler.num_contexts
    rows: list[int] = []
    epoch = 0
    while True:
        while len(rows) < batch_size:
            sampler.set_epoch(epoch)
            rows += list(sampler)
            epoch += 1
        batch = torch.tensor(rows[:batch_size])
        yield batch[labels[batch].argsort(stable=True)]
        rows = rows[batch_size:]


def _warn_of_collapse(divergences: dict[str, float]) -> None:
    collapsed = [name for name, nats in divergences.items() if nats < _COLLAPSED]
    if collapsed:
        logger.warning(
            f"The noise of {collapsed} says next to nothing about the images (less than {_COLLAPSED} nats):"
            " composition and counterfactuals will not keep what it stands for. Lower `kl_weight`, raise"
            " `concept_steps`, or give more images of these contexts."
        )
