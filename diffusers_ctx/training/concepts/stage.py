"""The first part of training: what the concepts are, learned with a light decoder in the place of the UNet.

In a diffusion loss, most of which does not depend on the context, that signal drowns. A light decoder sees little
else, and its steps are cheap. With an inverse posterior, three stages come before all terms are minimised together:

1. a plain VAE, which knows no contexts, learns a code that has all of the image in it;
2. an invertible map from that code to node values is learned from what contexts differ in, together with mechanisms
   and causal layer (`interventional_flow.py`), which are fitted to the values anew (`causal_fit.py`);
3. the posterior learns to read those values, and the decoder to decode them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from ...context import ContextModule, GaussianPosterior
from ...data import ContextBalancedSampler
from ..config import ContextConfig, TrainingConfig
from ..encoding.latents import ContextLatents
from ..run.accelerator import broadcast_weights
from ..run.concept_checkpoint import ConceptProgress, Stateful
from ..run.keyed_noise import KeyedNoise
from ..run.tracking import track_concepts
from .losses import unit_directions
from .objective import ConceptObjective
from .search import ImageCodes, search_flow


logger = logging.getLogger(__name__)

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]  # and figures to track

_COLLAPSED = 0.1  # nats; a concept that was found has some three
_LATENT_DIRECTIONS = 128
# shares of the steps; the rest minimises all terms
_CODE_SHARE = 0.3
_READING_SHARE = 0.1
_READING_WEIGHT = 20.0
_MECHANISMS_RATE = 10  # mechanisms must keep pace with values whose scale the encoder sets
_CODES_AT_ONCE = 512
_TRACKED_STEPS = 10


def learn_concepts(
    accelerator: Accelerator,
    context_module: ContextModule,
    latents: ContextLatents,
    config: TrainingConfig,
    progress: ConceptProgress,
) -> dict[str, float]:
    """Trains mechanisms, causal layer and posterior; the read-out learns later, with the UNet.

    Every process does the same steps and takes the main process's result: the steps are cheap, and their terms
    compare images within the batch, which must not be torn apart.

    Returns:
        The last step's figures, among them `kl/<name>` for each node, in nats.

    Raises:
        FloatingPointError: if the loss is not finite.
        SystemExit: if the run was asked to stop.
    """
    context_module.requires_grad_(True).read_out.requires_grad_(False)
    if latents.features is not None:
        context_module.encoder.fit(latents.features.flatten(0, 1))
    learning = ConceptStage(accelerator, context_module, latents, config, progress)
    steps = config.context.concept_steps
    if config.context.posterior_type == "inverse":
        code_steps, reading_steps = round(_CODE_SHARE * steps), round(_READING_SHARE * steps)
        learning.learn_code(code_steps)
        learning.learn_reading(learning.find_values(), reading_steps)
        steps -= code_steps + reading_steps
    figures = learning.learn_all(steps)
    broadcast_weights(context_module)
    if accelerator.is_main_process:
        _warn_of_collapse({name: figures[f"kl/{name}"] for name in context_module.config.concepts})
    return figures


@dataclass(frozen=True)
class DrawnImages:
    """The images of a step.

    Attributes:
        rows: (B,), which ones.
        latents: (B, C, h, w).
        features: (B, F, h', w'), what the posterior sees in the place of latents, if anything.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    features: torch.Tensor | None

    @property
    def seen(self) -> torch.Tensor:
        """What the posterior sees."""
        return self.latents if self.features is None else self.features


class ConceptStage:
    """The stages that see images.

    Args:
        accelerator: has the device.
        context_module: what learns.
        latents: the images.
        config: the run.
        progress: keeps what has been learned, and knows what an earlier run had.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        context_module: ContextModule,
        latents: ContextLatents,
        config: TrainingConfig,
        progress: ConceptProgress,
    ):
        self.accelerator = accelerator
        self.progress = progress
        self.options: ContextConfig = config.context
        self.seed = config.optimization.seed
        self.device = accelerator.device
        self.show_progress = accelerator.is_main_process
        self.module = context_module
        self.latents = latents
        contexts, self.labels = latents.masks.unique(dim=0, return_inverse=True)
        channels, size = latents.mean.shape[2], latents.mean.shape[-1]
        self.objective = ConceptObjective(context_module, contexts, channels, size, self.options).to(self.device)
        self.batches = _batches(latents.contexts, self.labels, self.seed, self.options.concept_batch_size)
        self.steps_done = 0

    def learn_code(self, steps: int) -> None:
        """Trains encoder and head as those of a plain VAE."""
        objective = self.objective
        decoder = objective.create_decoder().to(self.device)

        def loss(images: DrawnImages, random: KeyedNoise, step: int) -> Loss:
            posterior = GaussianPosterior.diagonal(*self.module.read_code(images.seen))
            code = posterior.at(self._normal(random, len(images.rows), *self.module.noise_shape))
            kl = posterior.kl().sum(dim=1).mean()
            mse = F.mse_loss(decoder(code), objective.targets(images.latents))
            value = objective.likelihood_loss(mse) + self._warm_up(step) * self.options.kl_weight * kl
            return value, {"code/reconstruction": mse, "code/kl": kl}

        groups = [{"params": [*self._reading_parameters(), *decoder.parameters()]}]
        self._minimise(loss, groups, steps, "Encoding", decoder=decoder)

    def find_values(self) -> torch.Tensor:
        """Learns mechanisms, causal layer and a map to node values; returns those of the images, (n, N, d)."""
        stage = "Telling concepts apart"
        if self.progress.take_up(stage, objective=self.objective) is not None:
            self.progress.before_step(stage, 0, objective=self.objective)
            codes, contexts, look = self._codes(), self.objective.contexts, self.progress.look
            self.progress.values = search_flow(
                self.module, codes, contexts, self.options, self.seed, self.show_progress, before_step=look
            )
        assert self.progress.values is not None
        return self.progress.values

    def learn_reading(self, values: torch.Tensor, steps: int) -> None:
        """Trains encoder and head to read these node values (n, N, d), and the decoder to decode them."""
        objective = self.objective

        def loss(images: DrawnImages, random: KeyedNoise, step: int) -> Loss:
            aims = values[images.rows].to(self.device)
            mse = F.mse_loss(objective.decoder(aims), objective.targets(images.latents))
            error = F.mse_loss(self.module.read_values(images.seen), aims)
            value = objective.likelihood_loss(mse) + _READING_WEIGHT * error
            return value, {"reading/reconstruction": mse, "reading/error": error}

        parameters = [*self._reading_parameters(), *objective.decoder.parameters()]
        self._minimise(loss, [{"params": parameters}], steps, "Reading concepts")

    def learn_all(self, steps: int) -> dict[str, float]:
        """Minimises all terms; the last step's figures."""
        mechanisms = [*self.module.mechanism.parameters(), *self.module.causal.parameters()]
        known = {id(parameter) for parameter in mechanisms}
        others = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in known]
        learning_rate = _MECHANISMS_RATE * self.options.concept_learning_rate
        groups: list[dict[str, Any]] = [
            {"params": others},
            {"params": mechanisms, "weight_decay": 0.0, "lr": learning_rate},
        ]
        shape = self.module.noise_shape

        def loss(images: DrawnImages, random: KeyedNoise, step: int) -> Loss:
            rows = images.rows
            eps, reference = self._normal(random, len(rows), *shape), self._normal(random, len(rows), *shape)
            directions = unit_directions(random, reference[0].numel()).to(self.device)
            latent_directions = unit_directions(random, self.objective.dimensions, _LATENT_DIRECTIONS).to(self.device)
            labels = self.labels[rows].to(self.device)
            inputs = (images.latents, labels, eps, reference, directions, latent_directions)
            return self.objective(*inputs, warm_up=self._warm_up(step), features=images.features)

        return self._numbers(self._minimise(loss, groups, steps, "Learning concepts"))

    def _minimise(
        self,
        loss_of: Callable[[DrawnImages, KeyedNoise, int], Loss],
        groups: list[dict[str, Any]],
        steps: int,
        stage: str,
        **parts: Stateful,
    ) -> dict[str, torch.Tensor]:
        """Steps of AdamW on `loss_of(images, random, step)`, but for those that are done; the last step's figures.

        `parts` are what has a state beside the objective.
        """
        figures: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.AdamW(groups, lr=self.options.concept_learning_rate, weight_decay=1e-4)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        parts |= {"objective": self.objective, "optimizer": optimizer, "schedule": schedule}
        taken_up = self.progress.take_up(stage, **parts)
        done = steps if taken_up is None else taken_up
        self._skip(done)
        for step in tqdm(range(done, steps), stage, steps, initial=done, disable=not self.show_progress):
            self.progress.before_step(stage, step, **parts)
            rows = next(self.batches)
            # negative numbers: those of the second part of training start at zero
            random = KeyedNoise(self.seed, -1 - self.steps_done)
            shape = self.latents.mean.shape[2:]
            noise, flip = random.normal(len(rows), *shape), random.uniform(len(rows))
            drawn = self.latents.draw(rows, noise, flip), self.latents.features_of(rows, flip)
            loss, figures = loss_of(DrawnImages(rows, *send_to_device(drawn, self.device)), random, step)
            if not loss.isfinite():
                raise FloatingPointError(
                    f"The loss is not finite at step {step} of learning the concepts; lower `concept_learning_rate`."
                )
            loss.backward()
            # the bound is a sum over dimensions, and so are its gradients
            torch.nn.utils.clip_grad_norm_(parameters, 50.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.steps_done += 1
            if self.accelerator.trackers and (self.steps_done % _TRACKED_STEPS == 0 or step == steps - 1):
                track_concepts(self.accelerator, self._numbers(figures), self.steps_done)
        return figures

    def _skip(self, steps: int) -> None:
        for _ in range(steps):
            next(self.batches)
        self.steps_done += steps

    def _numbers(self, figures: dict[str, torch.Tensor]) -> dict[str, float]:
        """Figures by name; those of nodes, which `kl` has one of for each, as `kl/<name>`."""
        named = {name: figure for name, figure in figures.items() if name != "kl"}
        if "kl" in figures:
            named |= {f"kl/{name}": figure for name, figure in zip(self.module.node_names, figures["kl"])}
        values = torch.stack([figure.detach() for figure in named.values()]).tolist()  # one wait for the device
        return dict(zip(named, values))

    @torch.no_grad()
    def _codes(self) -> ImageCodes:
        images = self.latents.seen[0].split(_CODES_AT_ONCE)
        read = [self.module.read_code(part.to(self.device)) for part in images]
        mean, log_variance = (torch.cat(parts).flatten(1).cpu() for parts in zip(*read))
        return ImageCodes(mean, (log_variance / 2).exp(), self.labels)

    def _reading_parameters(self) -> list[torch.nn.Parameter]:
        return [*self.module.encoder.parameters(), *self.module.head.parameters()]

    def _warm_up(self, step: int) -> float:
        return min(1.0, (step + 1) / self.options.kl_warmup_steps)

    def _normal(self, random: KeyedNoise, *shape: int) -> torch.Tensor:
        return random.normal(*shape).to(self.device)


def _warn_of_collapse(divergences: dict[str, float]) -> None:
    collapsed = [name for name, nats in divergences.items() if nats < _COLLAPSED]
    if collapsed:
        logger.warning(
            f"The noise of {collapsed} says next to nothing about the images (less than {_COLLAPSED} nats):"
            " composition and counterfactuals will not keep what it stands for. Lower `kl_weight`, raise"
            " `concept_steps`, or give more images of these contexts."
        )


def _batches(contexts: list[str], labels: torch.Tensor, seed: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Endless batches of rows, equally many of every context and sorted by it; at least `batch_size` of them."""
    sampler = ContextBalancedSampler(contexts, seed)
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
