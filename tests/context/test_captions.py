"""What captions say of node values: scores recomputed, and noise chosen by them."""

import pytest
import torch

from diffusers_ctx import ContextModule
from diffusers_ctx.context import CaptionLikelihood


def make_likelihood() -> CaptionLikelihood:
    torch.manual_seed(0)
    likelihood = CaptionLikelihood(6, 5)
    torch.nn.init.normal_(likelihood.embed_caption.weight)
    likelihood.standardize(3 + 2 * torch.randn(50, 5))
    return likelihood


def test_scores_are_inner_products_of_embeddings():
    likelihood, values, captions = make_likelihood(), torch.randn(4, 7, 3, 2), torch.randn(4, 5)
    scores = likelihood(values, captions)
    assert scores.shape == (4, 7)
    with torch.no_grad():
        standard = (captions[2] - likelihood.mean) / likelihood.scale
        expected = likelihood.embed_values(values[2, 6].flatten()) @ (likelihood.embed_caption.weight @ standard)
    assert scores[2, 6].item() == pytest.approx(expected.item(), rel=1e-5)


def test_standardisation_takes_off_the_mean_and_divides_by_one_scale():
    captions = torch.randn(40, 5) * torch.tensor([1.0, 2, 3, 0, 0]) + 4
    likelihood = CaptionLikelihood(6, 5)
    likelihood.standardize(captions)
    torch.testing.assert_close(likelihood.mean, captions.mean(dim=0))
    variance = captions.var(dim=0, correction=0).mean().item()
    assert likelihood.scale.item() == pytest.approx(variance**0.5, rel=1e-5)


def test_untrained_and_of_the_average_caption_it_says_nothing():
    values, captions = torch.randn(4, 7, 3, 2), torch.randn(4, 5)
    assert CaptionLikelihood(6, 5)(values, captions).abs().max() == 0
    likelihood = make_likelihood()
    assert likelihood(values, likelihood.mean.expand(4, -1)).abs().max() == 0


def test_the_contrast_is_over_values_and_not_over_captions():
    likelihood, values, captions = make_likelihood(), torch.randn(6, 3, 2), torch.randn(6, 5)
    scores = torch.stack([likelihood(values[None], caption[None])[0] for caption in captions])
    expected = -scores.log_softmax(dim=1).diagonal().mean()
    assert likelihood.contrast(values, captions).item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_is_chosen_with_scores_as_log_weights():
    torch.manual_seed(0)
    module = ContextModule(["night", "snow"], token_dim=8, caption_dim=5)
    torch.nn.init.normal_(module.captions.embed_caption.weight)
    draws, candidates, caption = 20_000, torch.randn(1, 3, *module.noise_shape), torch.randn(1, 5)
    numbers = torch.cat([candidates.flatten(2).expand(draws, -1, -1), torch.randn(draws, 3, 1)], dim=-1)
    with torch.no_grad():
        chosen = module.choose_noise(numbers, caption.expand(draws, -1))
        values = module.concept_values(candidates[0], torch.zeros(3, 2))
        weights = module.captions(values[None], caption)[0].softmax(dim=0)
    shares = torch.stack([(chosen == one).flatten(1).all(dim=1).float().mean() for one in candidates[0]])
    assert shares.sum() == 1 and weights.max() - weights.min() > 0.1
    torch.testing.assert_close(shares, weights, atol=0.02, rtol=0)
