"""The counterfactual benchmark: its files, mechanism and metrics, and the bed of contexts with its distribution."""

import gzip
import math

import numpy as np
import pytest
from beds import morphomnist, strokes
from beds.handwriting import CACHE_DIR, Handwriting
from beds.ink import Ink
from beds.morphomnist import MorphoDigits
from PIL import Image, ImageDraw


def rings(n: int, seed: int = 0) -> np.ndarray:
    """Pictures (n, 28, 28) of rings of random size and thickness."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(n):
        picture = Image.new("L", (112, 112))
        reach = rng.uniform(26, 38)
        box = (56 - reach, 56 - reach, 56 + reach, 56 + reach)
        ImageDraw.Draw(picture).ellipse(box, outline=255, width=int(rng.integers(8, 16)))
        pictures.append(np.asarray(picture.resize((28, 28), Image.Resampling.BOX)))
    return np.stack(pictures)


@pytest.fixture(scope="module")
def digits() -> MorphoDigits:
    """60 rings of the data set's distribution, made by the operations of the bed."""
    bed = Ink(Handwriting(rings(120), np.repeat(np.arange(10), 12)))
    sample = bed.sample(n=60)
    values = dict(zip(("digit", "thickness", "intensity"), sample.attributes.T))
    return MorphoDigits(sample.images, {**values, "digit": values["digit"].astype(int)})


def write_folder(folder, images, labels, values):
    for name, array in zip(morphomnist.FILES, (images, labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
    lines = ["index,thickness,intensity", *(f"{row},{t},{i}" for row, (t, i) in enumerate(values))]
    (folder / morphomnist.FILES[2]).write_text("\n".join(lines) + "\n")


def test_a_folder_is_read(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
    write_folder(tmp_path, images, np.array([7, 2], np.uint8), [(2.5, 145.25), (1.5, 80.0)])
    digits = morphomnist.load(tmp_path)
    assert digits.images.shape == (2, 32, 32, 3)
    for channel in range(3):
        np.testing.assert_array_equal(digits.images[:, 2:-2, 2:-2, channel], images)
    assert digits.values["digit"].tolist() == [7, 2]
    assert digits.values["thickness"].tolist() == [2.5, 1.5]
    assert digits.values["intensity"].tolist() == [145.25, 80.0]


def test_what_is_no_such_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        morphomnist.load(tmp_path)
    write_folder(tmp_path, rings(2), np.array([1], np.uint8), [(1, 80)])
    with pytest.raises(ValueError, match="2 images, 1 labels and 1"):
        morphomnist.load(tmp_path)
    (tmp_path / morphomnist.FILES[0]).write_bytes(gzip.compress(b"\x00\x00\x08\x03" + bytes(12) + b"more"))
    with pytest.raises(ValueError, match="no IDX file"):
        morphomnist.load(tmp_path)


def test_thickness_causes_intensity():
    assert morphomnist.intensity_of(np.array(2.5), np.array(0.0)) == 64 + 191 / 2
    expected = 64 + 191 / (1 + math.exp(-(0.5 * 1.2 + 2 * 2.0 - 5)))
    assert morphomnist.intensity_of(np.array(2.0), np.array(1.2)) == pytest.approx(expected)
    assert morphomnist.noise_of(np.array(2.0), np.array(expected)) == pytest.approx(1.2)


def test_an_intervention_on_the_cause_has_an_effect_and_one_on_the_effect_has_none():
    values = {"thickness": np.array([2.0]), "intensity": np.array([100.0]), "digit": np.array([3])}
    thicker = morphomnist.effect(values, {"thickness": np.array([3.0])})
    share = (100 - 64) / 191
    odds = share / (1 - share) * math.exp(2 * (3.0 - 2.0))  # noise stays, the logit moves by twice the thickness
    assert thicker["intensity"] == pytest.approx(64 + 191 * odds / (1 + odds))
    brighter = morphomnist.effect(values, {"intensity": np.array([200.0])})
    assert brighter == {"thickness": values["thickness"], "intensity": np.array([200.0]), "digit": values["digit"]}
    both = morphomnist.effect(values, {"thickness": np.array([3.0]), "intensity": np.array([200.0])})
    assert both["intensity"] == 200


def test_intensity_is_the_median_of_what_is_bright(digits):
    image = np.zeros((1, 4, 4), np.uint8)
    image[0, 0] = [200, 180, 101, 99]
    assert morphomnist.read_intensity(image) == 180  # 99 is less than half of 200
    read = morphomnist.read_intensity(digits.images[..., 0])
    assert np.abs(read - digits.values["intensity"]).mean() < 1.5


class KnownValues:
    """In the place of readers: the true values of the test's digits."""

    def __init__(self, digits):
        self.digits = digits

    def read(self, images):
        return self.digits.values


def test_operations_set_values_and_follow_the_mechanism(digits):
    operations = morphomnist.Operations(KnownValues(digits))
    targets = {"thickness": digits.values["thickness"][::-1]}
    images = operations(digits.images, targets)
    thickness = [strokes.thickness(strokes.enlarge(image)) for image in images[..., 0]]
    assert np.abs(thickness - targets["thickness"]).mean() < 0.25
    expected = morphomnist.effect(digits.values, targets)["intensity"]
    assert np.abs(morphomnist.read_intensity(images[..., 0]) - expected).mean() < 2
    brighter = operations(digits.images, {"intensity": np.full(60, 222.0)})
    assert np.abs(morphomnist.read_intensity(brighter[..., 0]) - 222).mean() < 2


def test_divergence_is_what_its_definition_says(digits):
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1)
    images, others = digits.images[:30], digits.images[30:]
    bins, targets = rng.integers(0, 2, 30), rng.integers(0, 2, 30)
    flat = images[..., 0].reshape(30, -1) / 255
    pca = PCA(4, whiten=True, random_state=0).fit(flat)
    real, other = pca.transform(flat), pca.transform(others[..., 0].reshape(30, -1) / 255)
    expected = []
    for row in range(30):
        moved = np.abs(real[row] - other[row]).sum()
        distances = np.array([np.abs(real[row] - one).sum() for one in real])
        nearer, farther = distances[bins == targets[row]] <= moved, distances[bins == bins[row]] >= moved
        expected.append(math.log(0.8 * math.exp(nearer.mean()) + 0.2 * math.exp(farther.mean())))
    divergence = morphomnist.latent_divergence(images, others, bins, targets, dimensions=4)
    assert divergence == pytest.approx(np.mean(expected))


def test_doing_nothing_is_perfect_in_composition_and_fails_in_effectiveness(digits):
    readers = morphomnist.MorphoReaders(digits, epochs=2)
    metrics = morphomnist.evaluate(morphomnist.do_nothing, digits, readers, seed=3)
    assert metrics["composition"] == {1: 0, 10: 0}
    assert metrics["reversibility"] == {"thickness": 0, "intensity": 0}
    rng = np.random.default_rng(3)
    rng.permutation(60)  # of the thickness
    wanted = rng.permutation(digits.values["intensity"])
    error = np.abs(wanted - morphomnist.read_intensity(digits.images[..., 0])).mean()
    assert metrics["effectiveness"]["intensity"]["intensity"] == pytest.approx(error)
    told = morphomnist.evaluate(morphomnist.Operations(readers), digits, readers, seed=3)
    assert told["effectiveness"]["intensity"]["intensity"] < 3 < error
    table = morphomnist.render_table({"nothing": metrics, "operations": told})
    assert table.count("published") == 3
    assert f"| {error:.2f} |" in table


def test_composition_counts_rounds_of_no_intervention(digits):
    def darken(images, interventions):
        return np.where(images > 0, images - 1, 0).astype(np.uint8)

    readers = morphomnist.MorphoReaders(digits, epochs=1)
    composition = morphomnist.evaluate(darken, digits, readers)["composition"]
    for rounds in (1, 10):
        expected = np.minimum(digits.images, rounds).mean()
        assert composition[rounds] == pytest.approx(expected)


def test_contexts_of_ink_are_the_distribution_and_its_interventions(digits):
    bed = Ink(Handwriting(rings(60), np.repeat(np.arange(10), 6)))
    observed, thicker = (bed.sample(interventions, n=20) for interventions in ((), ("thickness",)))
    scenes = observed.scenes
    np.testing.assert_allclose(observed.attributes[:, 2], morphomnist.intensity_of(scenes.thickness, scenes.noise))
    np.testing.assert_allclose(thicker.attributes[:, 2], morphomnist.intensity_of(scenes.do_thickness, scenes.noise))
    brighter = bed.counterfactual(thicker, ["intensity"])
    np.testing.assert_array_equal(brighter.attributes[:, 1], observed.attributes[:, 1])
    np.testing.assert_array_equal(brighter.attributes[:, 2], scenes.do_intensity)
    assert brighter.captions == observed.captions
    pair = bed.sample(["intensity", "thickness"], n=10, held_out=True)
    assert pair.interventions == ("thickness", "intensity")
    read = morphomnist.read_intensity(pair.images[..., 0])
    assert np.abs(read - pair.attributes[:, 2]).mean() < 2


@pytest.mark.skipif(not (CACHE_DIR / "morphomnist").exists(), reason="MorphoMNIST's test digits are not there")
def test_the_test_digits_have_the_mechanism():
    digits = morphomnist.load(CACHE_DIR / "morphomnist")
    assert digits.images.shape == (10000, 32, 32, 3)
    noise = morphomnist.noise_of(digits.values["thickness"], digits.values["intensity"])
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05
    read = morphomnist.read_intensity(digits.images[..., 0])
    assert np.abs(read - digits.values["intensity"]).mean() < 1
