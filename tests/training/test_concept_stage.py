"""Learning the concepts: every term of the objective recomputed, and a case whose answer is known."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CONCEPTS, make_context_module
from scipy.stats import norm

from diffusers_ctx import ContextModule
from diffusers_ctx.training.concepts.objective import ConceptObjective
from diffusers_ctx.training.concepts.stage import ConceptStage, balanced_rows
from diffusers_ctx.training.config import ContextConfig
from diffusers_ctx.training.encoding.latents import ContextLatents
from diffusers_ctx.training.run.concept_checkpoint import PROGRESS_NAME, ConceptCheckpoint
from diffusers_ctx.training.run.stop_signals import StopSignals


CONTEXTS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
CONFIG = ContextConfig(
    kl_weight=0.7,
    contrastive_weight=5.0,
    matching_weight=2.0,
    generation_weight=6.0,
    acyclicity_weight=3.0,
    sparsity_weight=0.4,
)


@pytest.fixture
def objective() -> ConceptObjective:
    torch.manual_seed(0)
    return ConceptObjective(make_context_module(), CONTEXTS, latent_channels=4, latent_size=16, config=CONFIG)


@pytest.fixture
def inputs(objective) -> tuple:
    generator = torch.Generator().manual_seed(1)
    shape = objective.context_module.noise_shape
    latents = torch.randn(12, 4, 16, 16, generator=generator)
    labels = torch.arange(4).repeat_interleave(3)
    eps, reference = torch.randn(2, 12, *shape, generator=generator).unbind()
    directions = torch.nn.functional.normalize(torch.randn(shape[0] * shape[1], 5, generator=generator), dim=0)
    latent_directions = torch.nn.functional.normalize(torch.randn(4 * 8 * 8, 5, generator=generator), dim=0)
    return latents, labels, eps, reference, directions, latent_directions


def averaged(latents: torch.Tensor) -> torch.Tensor:
    """The small latents (B, C, 8, 8) of latents (B, C, 16, 16)."""
    return latents.unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean(dim=(3, 5))


def cross_entropy_by_hand(module: ContextModule, latents: torch.Tensor, labels: torch.Tensor) -> float:
    losses = []
    for row, label in enumerate(labels):
        values = module.read_values(latents[row : row + 1])
        densities = [module.log_prob(values, context[None])[0, 0].item() for context in CONTEXTS]
        losses.append(np.log(np.exp(densities).sum()) - densities[label])
    return float(np.mean(losses))


def squared_wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([(x - y) ** 2 for x, y in zip(sorted(a), sorted(b))]))


def within_contexts_by_hand(a: np.ndarray, b: np.ndarray, directions: np.ndarray) -> float:
    """Over the four contexts, of three rows each, and over the directions."""
    distances = [
        squared_wasserstein(a[3 * g : 3 * g + 3] @ direction, b[3 * g : 3 * g + 3] @ direction)
        for direction in directions.T
        for g in range(4)
    ]
    return float(np.mean(distances))


def expected_order_statistics(count: int) -> np.ndarray:
    """Of draws from N(0, 1), by Blom's approximation."""
    return norm.ppf((np.arange(1, count + 1) - 3 / 8) / (count + 1 / 4))


def prior_distance_by_hand(noise: np.ndarray, directions: np.ndarray) -> float:
    """Within the four contexts, of three rows each, plus over all rows."""
    three, twelve = expected_order_statistics(3), expected_order_statistics(12)
    within = [
        squared_wasserstein(noise[3 * g : 3 * g + 3] @ direction, three)
        for direction in directions.T
        for g in range(4)
    ]
    pooled = [squared_wasserstein(noise @ direction, twelve) for direction in directions.T]
    return float(np.mean(within)) + float(np.mean(pooled))


def test_the_loss_is_its_terms(objective, inputs):
    latents, labels, eps, reference, directions, latent_directions = inputs
    module, mask = objective.context_module, CONTEXTS[labels]
    with torch.no_grad():
        loss, figures = objective(*inputs, warm_up=0.6)
        posterior = module.posterior(latents, mask)
        z = posterior.at(eps)
        pooled = averaged(latents)
        mse = (objective.decoder(module.concept_values(z, mask)) - pooled).square().mean()
        generated = objective.decoder(module.concept_values(reference, mask)).flatten(1).numpy()
        latent_swd = within_contexts_by_hand(generated, pooled.flatten(1).numpy(), latent_directions.numpy())
        contrast = cross_entropy_by_hand(module, latents, labels)
        noise_swd = prior_distance_by_hand(z.flatten(1).numpy(), directions.numpy())
        expected = (
            4 * 8 * 8 / 2 * np.log(mse.item())
            + 0.7 * 0.6 * posterior.kl().sum(dim=1).mean().item()
            + 5.0 * contrast
            + 2.0 * noise_swd
            + 6.0 * latent_swd
            + 3.0 * module.causal.acyclicity().item()
            + 0.4 * module.causal.strengths().sum().item()
        )
    assert figures["contrastive_loss"].item() == pytest.approx(contrast, rel=1e-3)
    assert figures["noise_swd"].item() == pytest.approx(noise_swd, rel=1e-4)
    assert figures["latent_swd"].item() == pytest.approx(latent_swd, rel=1e-4)
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_the_posterior_may_see_features_and_the_decoder_still_aims_at_latents(objective, inputs):
    latents, labels, eps, _, directions, _ = inputs
    module, mask = objective.context_module, CONTEXTS[labels]
    features = torch.randn(12, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, figures = objective(*inputs, warm_up=1.0, features=features)
        z = module.posterior(features, mask).at(eps)
        mse = (objective.decoder(module.concept_values(z, mask)) - averaged(latents)).square().mean()
    assert figures["reconstruction"].item() == pytest.approx(mse.item(), rel=1e-4)
    assert figures["contrastive_loss"].item() == pytest.approx(
        cross_entropy_by_hand(module, features, labels), rel=1e-3
    )
    noise_swd = prior_distance_by_hand(z.flatten(1).numpy(), directions.numpy())
    assert figures["noise_swd"].item() == pytest.approx(noise_swd, rel=1e-4)


@pytest.mark.parametrize(("latent_size", "decoded"), [(3, 4), (8, 8), (12, 8), (16, 8), (32, 16), (64, 16)])
def test_latents_of_any_size_are_averaged_to_one_that_the_decoder_makes(latent_size, decoded):
    objective = ConceptObjective(make_context_module(), CONTEXTS, 4, latent_size, CONFIG)
    z = torch.zeros(2, *objective.context_module.noise_shape)
    assert objective.size == decoded
    assert objective.decode(z, torch.zeros(2, 3)).shape == (2, 4, decoded, decoded)


def test_batches_have_every_context_equally_often():
    contexts = ["obs"] * 5 + ["snow"] * 2 + ["night"] * 3
    labels = torch.tensor([0] * 5 + [2] * 2 + [1] * 3)
    batches = balanced_rows(contexts, labels, seed=0, batch_size=7)
    for _ in range(5):
        assert labels[next(batches)].tolist() == [0] * 3 + [1] * 3 + [2] * 3


def two_concept_latents(n: int) -> tuple[ContextLatents, torch.Tensor]:
    """Latents of a world with night → snow, each shown in a half of the picture; and the concepts' true values."""
    generator = torch.Generator().manual_seed(0)
    rows, values, names = [], [], []
    for context, name in enumerate(("obs", "night", "snow")):
        noise = torch.randn(n, 2, generator=generator)
        night = 2 + 0.5 * noise[:, 0] if context == 1 else noise[:, 0]
        snow = -2 + 0.5 * noise[:, 1] if context == 2 else 0.8 * night + noise[:, 1]
        picture = torch.zeros(n, 1, 8, 8)
        picture[:, :, :, :4] = night[:, None, None, None] / 2
        picture[:, :, :, 4:] = snow[:, None, None, None] / 2
        rows.append(picture)
        values.append(torch.stack([night, snow], dim=1))
        names += [name] * n
    masks = torch.tensor([[0.0, 0], [1, 0], [0, 1]]).repeat_interleave(n, dim=0)
    mean = torch.cat(rows)[None]
    geometry = torch.zeros(1, 3 * n, 6)
    return ContextLatents(mean, torch.full_like(mean, 0.05), masks, names, [""] * (3 * n), geometry), torch.cat(values)


def learn_two_concepts(
    latents: ContextLatents, checkpoint: ConceptCheckpoint, **options
) -> tuple[ContextModule, dict[str, float]]:
    torch.manual_seed(0)
    module = ContextModule(
        ["night", "snow"],
        token_dim=8,
        num_hidden_factors=0,
        noise_dim=1,
        concept_dim=1,
        posterior_in_channels=1,
        posterior_width=8,
    )
    context = ContextConfig(num_hidden_factors=0, concept_batch_size=96, **options)
    return module, ConceptStage(Accelerator(cpu=True), module, latents, context, seed=0, checkpoint=checkpoint).run()


class StopAt(StopSignals):
    """A SIGTERM comes when it is asked for the nth time."""

    def __init__(self, number: int | None):
        super().__init__(Accelerator(cpu=True))
        self.asked, self.number = 0, number

    def requested(self) -> bool:
        self.asked += 1
        if self.asked == self.number:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().requested()


def checkpoint_in(folder: Path, stop_at: int | None = None, every: int = 1000) -> ConceptCheckpoint:
    return ConceptCheckpoint(Accelerator(cpu=True), folder, {}, StopAt(stop_at), every)


def test_concepts_of_a_known_world_are_found(caplog, tmp_path):
    """Each node holds its own concept, and a pair that was never seen is moved to where it belongs."""
    # of half as many images, the learned edges depend on the processor's arithmetic
    latents, truth = two_concept_latents(1000)
    module, figures = learn_two_concepts(latents, checkpoint_in(tmp_path), concept_steps=300)
    assert not caplog.records
    assert {"kl/night", "kl/snow", "reconstruction", "contrastive_loss", "noise_swd", "latent_swd"} == set(figures)
    with torch.no_grad():
        values = module.read_values(latents.mean[0])[..., 0]
        correlations = np.corrcoef(values.T.numpy(), truth.T.numpy())[:2, 2:]
        assert abs(correlations[0, 0]) > 0.93 and abs(correlations[1, 1]) > 0.93

        # do(night, snow): night ~ N(2, 0.5²), snow ~ N(-2, 0.5²), no longer related
        pair = module.concept_values(torch.randn(4000, 2, 1), torch.ones(4000, 2))[..., 0]
        design = torch.stack([values.new_ones(len(values)), values[:, 0], values[:, 1]], dim=1)
        to_truth = torch.linalg.lstsq(design, truth).solution
        samples = torch.cat([torch.ones(4000, 1), pair], dim=1) @ to_truth
    # observational means are 0, and if snow still followed night it would be at +1.6
    night, snow = samples.mean(dim=0).tolist()
    assert 1 < night < 2.6 and -2.6 < snow < -0.8
    strengths = module.causal.strengths()
    assert strengths[1, 0] > 2 * strengths[0, 1]  # night → snow, and not the other way


def test_noise_that_collapses_is_warned_of(caplog, tmp_path):
    latents, _ = two_concept_latents(100)
    options = {"concept_steps": 150, "posterior_type": "amortized", "kl_weight": 1e4}  # all steps are of all terms
    _, figures = learn_two_concepts(latents, checkpoint_in(tmp_path), **options)
    assert max(figures["kl/night"], figures["kl/snow"]) < 0.1
    assert "The noise of ['night', 'snow'] says next to nothing" in caplog.text and "Lower `kl_weight`" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    latents, _ = two_concept_latents(10)
    latents.mean[0, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="concept_learning_rate"):
        learn_two_concepts(latents, checkpoint_in(tmp_path))


@pytest.mark.parametrize(
    ("posterior_type", "moments"),
    [
        # of 10 steps: 3 of the code, once before the map and at its 20 steps, 1 of reading, 6 of all terms
        ("inverse", [2, 7, 20, 28]),
        ("amortized", [5]),
    ],
)
def test_learning_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, posterior_type, moments):
    latents, _ = two_concept_latents(20)
    options = {"concept_steps": 10, "posterior_type": posterior_type}
    undisturbed, figures = learn_two_concepts(latents, checkpoint_in(tmp_path), **options)
    after = torch.rand(1)
    for moment in moments:
        folder = tmp_path / str(moment)
        folder.mkdir()
        checkpoint = checkpoint_in(folder, stop_at=moment)
        with checkpoint.stop, pytest.raises(SystemExit):
            learn_two_concepts(latents, checkpoint, **options)
        assert checkpoint.stop.asked == moment  # it did not go on for a while
        module, got = learn_two_concepts(latents, checkpoint_in(folder), **options)
        weights = module.state_dict()
        assert not [n for n, weight in undisturbed.state_dict().items() if not torch.equal(weight, weights[n])]
        assert got == figures and torch.equal(torch.rand(1), after)


def test_learning_goes_on_from_what_was_kept_last(tmp_path):
    latents, _ = two_concept_latents(20)
    undisturbed, _ = learn_two_concepts(latents, checkpoint_in(tmp_path, every=5), concept_steps=20)
    kept = torch.load(tmp_path / PROGRESS_NAME)
    assert (kept["stage"], kept["step"]) == ("ALL", 10)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS_NAME]
    module, _ = learn_two_concepts(latents, checkpoint_in(tmp_path, every=5), concept_steps=20)
    weights = module.state_dict()
    assert not [n for n, weight in undisturbed.state_dict().items() if not torch.equal(weight, weights[n])]


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def fail(*arguments) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    latents, _ = two_concept_latents(20)
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"could not be written .* free some of it"):
        learn_two_concepts(latents, checkpoint_in(tmp_path), concept_steps=20)
    assert list(tmp_path.iterdir()) == []


def test_concepts_are_named():
    assert make_context_module().node_names == [*CONCEPTS, "hidden_0", "hidden_1"]
