"""Labels of pictures: letters that the fonts have, and escapes for others."""

import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from diffusers_ctx.plot import draw_grid, edge_strengths, labels
from diffusers_ctx.plot.labels import printable


@pytest.fixture(autouse=True)
def fresh_fonts():
    labels._fonts.cache_clear()
    yield
    labels._fonts.cache_clear()


def label(text: str) -> np.ndarray:
    """The pixels of a label."""
    return np.asarray(draw_grid([np.full((1, 4, 200, 3), 255, np.uint8)], [text]))


@pytest.mark.parametrize("text", ["night+snow", "été", "Größe ↔ Łódź", "ψ, Ωμέγα", "снег", "שלג"])
def test_letters_are_drawn(text):
    assert printable(text) == text
    pictures = [label(char * 8) for char in set(text.replace(" ", ""))]
    box = label("\U0010fffe" * 8)
    assert all(picture.std() > 10 for picture in pictures) and not any(np.array_equal(x, box) for x in pictures)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)  # no two are the same box


def test_other_letters_are_escaped():
    assert printable("夜+雪") == r"\u591c+\u96ea" and printable("a\nb") == r"a\nb"
    assert np.array_equal(label("夜"), label(r"\u591c"))


def test_two_normal_forms_are_one_label():
    assert printable("e\u0301te\u0301") == "été" and np.array_equal(label("e\u0301te\u0301"), label("été"))


def test_without_matplotlib_only_english_letters_are_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert printable("été, night") == r"\xe9t\xe9, night"
    assert label("été").std() > 10


def test_english_labels_are_as_ever():
    from PIL import ImageDraw

    expected = Image.new("RGB", (200, 18), "white")
    ImageDraw.Draw(expected).text((2, 1), "night+snow", fill="black")
    assert np.array_equal(label("night+snow"), np.asarray(expected))


def test_the_nodes_of_a_graph_have_readable_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edge_strengths({"": np.eye(3)}, ["снег", "夜", "$x$ a $"]).savefig(tmp_path / "graph.png")
