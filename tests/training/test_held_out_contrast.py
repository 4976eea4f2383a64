"""Held-out images of each concept against observational ones, while concepts are learned."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_ctx import ContextModule
from diffusers_ctx.training.concepts.held_out import held_out_contrast
from diffusers_ctx.training.concepts.stage import ConceptStage
from diffusers_ctx.training.config import ContextConfig
from diffusers_ctx.training.encoding.latents import ContextLatents


def world(contexts: dict[str, list[float]], n: int, seed: int) -> ContextLatents:
    """Images whose upper and lower halves are as bright as the context sets them, and vary a little."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor(list(contexts.values())).repeat_interleave(n, dim=0)
    masks = (means != 0).float()
    values = 2 * means + torch.randn(means.shape, generator=generator)
    mean = values.repeat_interleave(4, dim=1)[None, :, None, :, None].repeat(1, 1, 1, 1, 8)
    names = [name for name in contexts for _ in range(n)]
    nothing = [""] * len(names)
    return ContextLatents(mean, torch.full_like(mean, 0.05), masks, names, nothing, torch.zeros(1, len(names), 6))


def create_module() -> ContextModule:
    torch.manual_seed(0)
    options = {"noise_dim": 1, "concept_dim": 1, "posterior_in_channels": 1, "posterior_width": 8}
    return ContextModule(["night", "snow"], token_dim=8, num_hidden_factors=0, **options)


def test_the_contrast_is_that_of_two_contexts():
    module = create_module()
    torch.nn.init.normal_(module.mechanism.bias_do)
    held_out = world({"obs": [0, 0], "night": [1, 0], "night+snow": [1, 1]}, n=5, seed=1)
    found = held_out_contrast(module, held_out)
    assert set(found) == {"night"}  # no image shows snow alone
    losses = []
    with torch.no_grad():
        for row in range(10):
            values = module.read_values(held_out.mean[0, row : row + 1])
            obs, night = (module.log_prob(values, torch.tensor([[k, 0.0]])).item() for k in (0.0, 1.0))
            losses.append(math.log(math.exp(obs) + math.exp(night)) - (night if row >= 5 else obs))
    assert found["night"].item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_large_set_is_read_in_parts():
    module, sizes = create_module(), []
    module.encoder.register_forward_hook(lambda encoder, inputs, output: sizes.append(len(inputs[0])))
    held_out_contrast(module, world({"obs": [0, 0], "night": [1, 0]}, n=300, seed=1))
    assert sizes == [512, 88]


def test_trackers_hear_of_it_and_nothing_learns_from_it(tmp_path):
    contexts = {"obs": [0.0, 0], "night": [2, 0], "snow": [0, 2]}
    options = ContextConfig(num_hidden_factors=0, concept_batch_size=12, concept_steps=10)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    held_out = world(contexts, 8, seed=1)
    weights = []
    for images in (None, held_out):
        module = create_module()
        ConceptStage(accelerator, module, world(contexts, 16, seed=0), options, 0, held_out=images).run()
        weights.append(module.state_dict())
    accelerator.end_training()
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    (events,) = tmp_path.rglob("events.*")
    logged = EventAccumulator(str(events)).Reload()
    for name, nats in held_out_contrast(module, held_out).items():
        curve = logged.Scalars(f"concepts/held_out_contrast/{name}")
        assert [event.step for event in curve] == [4, 10]  # the ends of two parts; the code knows no contexts
        assert curve[-1].value == pytest.approx(nats.item(), rel=1e-5)
