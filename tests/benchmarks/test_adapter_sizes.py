"""The sizes of adapters on real bases are those of the code as it is."""

import json

import adapter_sizes
import pytest
from conftest import SDXL_UNET


SIZES = json.loads(adapter_sizes.RESULTS.read_text(encoding="utf-8"))
PUBLISHED = {  # weights of UNets and transformers on the Hub
    "Stable Diffusion 1.x": 859_520_964,
    "Stable Diffusion 2.x": 865_910_724,
    "Stable Diffusion XL": 2_567_463_684,
    "Stable Diffusion 3 medium": 2_028_328_000,
    "Stable Diffusion 3.5 medium": 2_243_171_520,
    "FLUX.1 dev": 11_901_408_320,
}


def test_sizes_are_counted_anew():
    for name in ("Stable Diffusion 3 medium", "Stable Diffusion 1.x"):
        assert adapter_sizes.count_weights(adapter_sizes.BASES[name]) == SIZES[name]
    name = "Stable Diffusion 1.x"
    # keys and values of 16 layers of widths 320, 640 and 1280, five, five and six of them
    assert SIZES[name]["attention"] == 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_their_published_sizes(name):
    assert PUBLISHED[name] in (SIZES[name].get("unet"), SIZES[name].get("transformer"))


def test_every_base_was_counted():
    assert set(SIZES) == {"concepts", *adapter_sizes.BASES}


def test_the_configuration_of_xl_is_that_of_the_tests():
    assert adapter_sizes.BASES["Stable Diffusion XL"] == SDXL_UNET
