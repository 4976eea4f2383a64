"""What comes with the library loads and fits together."""

from pathlib import Path

import pytest
import torch

from diffusers_ctx import ComposablePipeline, embedded_adapter, embedded_base
from diffusers_ctx.adapter_format import public_name
from diffusers_ctx.data import quad


def test_the_embedded_adapter_composes_on_the_embedded_base():
    pipeline = ComposablePipeline.from_pretrained(embedded_base())
    pipeline.load_context_adapter(embedded_adapter("quad"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.concepts == list(quad.CONCEPTS)
    # of 24 images already, two real samples' means can be 0.12 apart
    prompts = quad.generate(n=96, seed=quad.FIRST_HELD_OUT_SEED).captions

    def top_right(interventions: list[str]) -> torch.Tensor:
        """Mean color of the quadrant that quad4 sets."""
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            prompts,
            interventions=interventions,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=generator,
            output_type="pt",
        ).images
        return images[:, :, :12, -12:].mean(dim=(0, 2, 3))

    real = (
        quad.generate(["quad4"], n=200, seed=quad.FIRST_HELD_OUT_SEED).images[:, :12, -12:].mean(axis=(0, 1, 2)) / 255
    )
    expected = torch.tensor(real, dtype=torch.float32)
    for interventions in (["quad4"], ["quad1", "quad4"]):
        assert (top_right(interventions) - expected).abs().max() < 0.12
    assert (top_right([]) - expected).abs().max() > 0.2


def test_the_embedded_base_has_one_name_however_its_folder_is_spelled(monkeypatch):
    folder = Path(embedded_base())
    for place, spelling in ((folder.parent, "quad-base"), (folder.parents[1], "assets/quad-base/"), (folder, ".")):
        monkeypatch.chdir(place)
        assert public_name(spelling) == "embedded_base()"
    monkeypatch.chdir(folder.parent)
    assert public_name("quad-context") == "quad-context"


def test_an_adapter_that_there_is_not():
    with pytest.raises(ValueError, match=r"no embedded adapter 'mnist'; there are \['quad'\]"):
        embedded_adapter("mnist")
