"""What comes with the library loads and fits together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.adapter_format import public_name
from diffusers_ctx.data import quad


CORNERS = {"quad1": (slice(-12, None), slice(None, 12)), "quad4": (slice(None, 12), slice(-12, None))}
"""Rows and columns of pixels that no figure covers, in the quadrants of two concepts."""


@pytest.fixture(scope="module")
def pipeline() -> ComposablePipeline:
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(sample: Callable[..., Any], interventions: list[str]) -> np.ndarray:
    # of 24 images already, two real samples' means can be 0.12 apart
    prompts = quad.generate(n=96, seed=quad.FIRST_HELD_OUT_SEED).captions
    return sample(
        prompts,
        interventions=interventions,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def color_error(images: np.ndarray, concept: str) -> float:
    """Largest error of a channel, in [0, 1], of the mean color that an intervention gives to its quadrant."""
    rows, columns = CORNERS[concept]
    real = quad.generate([concept], n=200, seed=quad.FIRST_HELD_OUT_SEED).images / 255
    means = [each[:, rows, columns].mean(axis=(0, 1, 2)) for each in (images, real)]
    return float(np.abs(means[0] - means[1]).max())


def composes(sample: Callable[..., Any]) -> bool:
    """Whether do(quad1, quad4) sets the colors of both quadrants."""
    images = draw(sample, ["quad1", "quad4"])
    return all(color_error(images, concept) < 0.12 for concept in CORNERS)


def test_the_embedded_adapter_composes_on_the_embedded_base(pipeline):
    assert pipeline.concepts == list(quad.CONCEPTS)
    assert color_error(draw(pipeline, ["quad4"]), "quad4") < 0.12
    assert color_error(draw(pipeline, []), "quad4") > 0.2
    assert composes(pipeline)


@pytest.mark.parametrize("ignored", CORNERS)
def test_an_adapter_that_ignores_one_of_two_interventions_does_not_compose(pipeline, ignored):
    def sample(prompts: list[str], interventions: list[str], **arguments) -> Any:
        return pipeline(prompts, interventions=[name for name in interventions if name != ignored], **arguments)

    assert not composes(sample)


def test_the_embedded_base_has_one_name_however_its_folder_is_spelled(monkeypatch):
    folder = Path(embedded_base())
    for place, spelling in ((folder.parent, "quad-base"), (folder.parents[1], "assets/quad-base/"), (folder, ".")):
        monkeypatch.chdir(place)
        assert public_name(spelling) == "embedded_base()"
    assert public_name(embedded_base("pictures")) == 'embedded_base("pictures")'
    monkeypatch.chdir(folder.parent)
    assert public_name("quad-context") == "quad-context"


def test_an_adapter_that_there_is_not():
    with pytest.raises(ValueError, match=r"no embedded adapter 'mnist'; there are \['quad'\]"):
        embedded_adapter("mnist")
    with pytest.raises(ValueError, match=r"no embedded base 'mnist'; there are \['quad', 'pictures'\]"):
        embedded_base("mnist")
