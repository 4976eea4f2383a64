"""Rendered toys: hues are where they should be, counterfactuals change what was intervened on alone."""

import colorsys
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from beds.renderer import BODIES, View, render
from beds.scenes import CONCEPTS, DEVIATION, HUES, Scenes, draw_toys, hues_of


VIEW = View("box", 0.0, 0.0, 30.0, 45.0, background=0.6, toy=0.08, spotlight=0.14, seed=0)
CORNER, TOY = np.s_[:6, :6], np.s_[36:44, 28:36]  # wall in the sky's light; a side of the body


def hue(pixels):
    """Hue of the mean color (turns), of pixels (..., 3) uint8, in linear light."""
    return colorsys.rgb_to_hsv(*((pixels / 255.0) ** 2.2).reshape(-1, 3).mean(0))[0]


@pytest.fixture(scope="module")
def bed():
    return Scenes()


def test_hues_are_normal_about_the_means_of_their_regime():
    toys = draw_toys(4000, seed=0)
    for intervened in (False, True):
        hues = hues_of(toys.noise, np.full(3, intervened))
        np.testing.assert_allclose(hues.mean(0), [HUES[name][intervened] for name in CONCEPTS], atol=0.002)
        np.testing.assert_allclose(hues.std(0), DEVIATION, rtol=0.05)
    one = hues_of(toys.noise, np.array([False, True, False])) - hues_of(toys.noise, np.zeros(3, bool))
    np.testing.assert_allclose(one, np.tile([0, HUES["obj"][1] - HUES["obj"][0], 0], (4000, 1)), atol=1e-12)


def test_toys_vary_and_fewer_are_the_first_of_more():
    toys, few = draw_toys(900, seed=3), draw_toys(5, seed=3)
    np.testing.assert_array_equal(few.noise, toys.noise[:5])
    np.testing.assert_array_equal(few.place, toys.place[:5])
    assert np.bincount(toys.body).min() > 250 and len(np.bincount(toys.body)) == len(BODIES)
    assert np.abs(toys.place).max(0) == pytest.approx((0.9, 0.7), rel=0.01)
    assert np.abs(np.corrcoef(np.column_stack([toys.noise, toys.place, toys.angles]).T) - np.eye(7)).max() < 0.12


def test_a_picture_shows_its_hues():
    picture = render(VIEW, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert hue(picture[CORNER]) == pytest.approx(VIEW.background, abs=0.02)
    assert hue(picture[TOY]) == pytest.approx(VIEW.toy, abs=0.06)  # lit by sky, lamp and floor
    np.testing.assert_array_equal(picture, render(VIEW, 64))


def turned(body, angle):
    return render(replace(VIEW, body=body, angle=angle), 32).astype(int)


@pytest.mark.parametrize("body", BODIES)
def test_the_arm_shows_how_a_toy_is_turned(body):
    changed = np.abs(turned(body, 0.0) - turned(body, 180.0)).max(-1) > 40
    assert changed[:, :16].sum() > 10 and changed[:, 16:].sum() > 10


def test_bodies_can_be_told_apart():
    for one, other in combinations(BODIES, 2):
        assert (np.abs(turned(one, 45.0) - turned(other, 45.0)).max(-1) > 40).sum() > 10


def test_only_what_was_intervened_on_changes(bed):
    factual = bed.sample((), 4, seed=1)
    background = bed.counterfactual(factual, ("bg",))
    np.testing.assert_array_equal(background.images, bed.sample(("bg",), 4, seed=1).images)
    np.testing.assert_array_equal(bed.counterfactual(background, ()).images, factual.images)
    assert background.captions == factual.captions and background.scenes is factual.scenes
    np.testing.assert_allclose(
        background.attributes - factual.attributes, np.tile([-0.25, 0, 0, 0, 0, 0], (4, 1)), atol=1e-12
    )
    for before, after in zip(factual.images, background.images):
        assert hue(before[CORNER]) - hue(after[CORNER]) == pytest.approx(0.25, abs=0.06)
    recolored = bed.counterfactual(factual, ("obj",))
    for before, after in zip(factual.images, recolored.images):
        assert hue(before[CORNER]) == pytest.approx(hue(after[CORNER]), abs=0.01)


def test_the_spotlight_lights_floor_and_toy_alike(bed):
    factual = bed.sample((), 3, seed=2)
    lit = bed.counterfactual(factual, ("sl",))
    yellow, cyan = (sample.images.astype(float).mean((0, 1, 2)) for sample in (factual, lit))
    assert (yellow[0] - yellow[2]) > (cyan[0] - cyan[2]) + 20  # less red, more blue


def test_held_out_toys_are_others(bed):
    assert not set(draw_toys(50, 0).seed) & set(draw_toys(50, 1_000_000).seed)
    held_out = bed.sample((), 2, held_out=True)
    np.testing.assert_array_equal(held_out.scenes.seed, draw_toys(2, 1_000_000).seed)
    assert bed.held_out == (("bg", "obj"), ("bg", "sl"), ("obj", "sl"), ("bg", "obj", "sl"))


def test_readers_learn_on_toys_of_their_own(monkeypatch):
    monkeypatch.setattr("beds.scenes._READING_SCENES", 96)
    bed = Scenes(resolution=32)
    sample = bed.unseen(("bg",), 24)
    read = bed.read(sample.images)
    assert read.shape == sample.attributes.shape
    assert np.abs(read[:, 0] - HUES["bg"][1]).mean() < 0.08  # though the observational hue is 0.25 away
    assert set(read[:, 3]) <= {0.0, 1.0, 2.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bed: bed.sample(("fog",), 1), r"fog.*\['bg', 'obj', 'sl'\]"),
        (lambda bed: bed.sample((), 1, seed=-1), "999999"),
    ],
)
def test_errors(bed, call, message):
    with pytest.raises(ValueError, match=message):
        call(bed)


def test_without_the_renderer_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-ctx\[scenes\]'"):
        render(VIEW, 16)
