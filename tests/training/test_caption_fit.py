"""Learning what captions say, on images whose captions depend on a node."""

import pytest
import torch
from accelerate import Accelerator

from diffusers_ctx import ContextModule
from diffusers_ctx.training.concepts.caption_fit import fit_captions
from diffusers_ctx.training.encoding.latents import ContextLatents


CAPTIONS = ["dark", "bright"]


def encode(captions: list[str]) -> dict[str, torch.Tensor]:
    """Of one token each."""
    return {"text": embed(captions)[:, None]}


def embed(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[1.0, 0.0, 5.0] if caption == "dark" else [0.0, 1.0, 5.0] for caption in captions])


def make_latents(n: int, captions: list[str] | None = None) -> tuple[ContextModule, ContextLatents]:
    """Images in a module's own words: captions say whether the second node, as it is read, is above zero."""
    torch.manual_seed(0)
    module = ContextModule(["night"], token_dim=8, num_hidden_factors=1, noise_dim=1, concept_dim=1, caption_dim=3)
    latents, masks = torch.randn(1, n, 4, 8, 8), torch.arange(n)[:, None] % 2.0
    with torch.no_grad():
        module.head.layers[-1].weight.mul_(600)  # values that differ from image to image
        told = module.read_values(latents[0])[:, 1, 0]
        threshold = told.median()
    captions = captions or [CAPTIONS[int(value > threshold)] for value in told]
    geometry = torch.zeros(1, n, 6)
    return module, ContextLatents(latents, torch.zeros_like(latents), masks, ["obs"] * n, captions, geometry)


def test_it_learns_what_captions_depend_on():
    module, latents = make_latents(3000)
    fit_captions(Accelerator(cpu=True), module, latents, encode, seed=0)
    with torch.no_grad():
        values = module.read_values(latents.mean[0])
        dark, bright = (module.captions(values[None], embed([caption]))[0] for caption in CAPTIONS)
    is_bright = torch.tensor([caption == "bright" for caption in latents.captions])
    gap = bright - dark
    assert gap[is_bright].mean() - gap[~is_bright].mean() > 0.4  # nats


def test_images_without_a_caption_say_nothing():
    module, latents = make_latents(6000)
    expected = make_latents(6000)[1].captions
    latents.captions = [caption if row % 2 else "" for row, caption in enumerate(expected)]
    fit_captions(Accelerator(cpu=True), module, latents, encode, seed=0)
    with torch.no_grad():
        values = module.read_values(latents.mean[0])
        dark, bright = (module.captions(values[None], embed([caption]))[0] for caption in CAPTIONS)
    is_bright = torch.tensor([caption == "bright" for caption in expected])
    gap = bright - dark
    assert gap[is_bright].mean() - gap[~is_bright].mean() > 0.4
    torch.testing.assert_close(module.captions.mean, embed([x for x in latents.captions if x]).mean(dim=0))


@pytest.mark.parametrize("captions", [["dark"] * 600, ["dark", ""] * 300, None])
def test_where_there_is_nothing_to_learn_it_says_nothing(captions, caplog):
    module, latents = make_latents(100 if captions is None else 600, captions)
    fit_captions(Accelerator(cpu=True), module, latents, encode, seed=0)
    with torch.no_grad():
        scores = module.captions(module.read_values(latents.mean[0])[None], embed(CAPTIONS))
    assert scores.abs().max() == 0
    assert bool(caplog.records) == (captions is None)  # too few captions are said, alike ones are not


def test_captions_that_depend_on_nothing_are_learned_by_heart_for_a_short_while_alone():
    module, latents = make_latents(3000, CAPTIONS * 1500)
    fit_captions(Accelerator(cpu=True), module, latents, encode, seed=0)
    with torch.no_grad():
        scores = module.captions(module.read_values(latents.mean[0])[None], embed(CAPTIONS))
    assert scores.std(dim=1).max() < 0.1


def test_it_is_the_same_with_the_same_seed():
    weights = []
    for _ in range(2):
        module, latents = make_latents(1000)
        fit_captions(Accelerator(cpu=True), module, latents, encode, seed=1)
        weights.append(module.captions.embed_caption.weight.clone())
    assert torch.equal(*weights) and weights[0].abs().max() > 0
