"""Weather and crops on small landscapes made here; readers on the real photographs, where these were fetched."""

import struct
from pathlib import Path

import numpy as np
import pytest
from beds import weather
from beds.bed import training_seed
from beds.photograph_sources import HELD_OUT, READING, TRAINING, archive_member, fetch, resources
from beds.photographs import PhotographsBed
from PIL import Image


CACHE = Path("runs/sources")
DEGREES = weather.Degrees(night=2.5, snow=0.8, fog=2.0)


def landscape(seed=0, height=60, width=90):
    """Blue sky, a red house with a lamp and green ground."""
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = (0.4, 0.6, 0.9)
    picture[height // 2 :] = (0.2, 0.45, 0.15)
    picture[height // 3 : 2 * height // 3, width // 3 : width // 2] = (0.5, 0.2, 0.15)
    picture[height // 2, width // 3 + 4] = 1
    picture[height // 3 :] += rng.normal(0, 0.02, picture[height // 3 :].shape)
    return np.clip(picture, 0, 1)


@pytest.fixture(scope="module")
def scene():
    picture = landscape()
    sky = weather.sky(picture)
    return picture, sky, weather.distance(picture, sky)


def applied(scene, names, degrees=DEGREES, seed=0):
    return weather.apply(*scene, names, degrees, seed).astype(float) / 255


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    cache = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate((*TRAINING, *READING, *HELD_OUT)):
        file = cache / "photographs" / f"{name}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = np.rint(255 * landscape(seed, 60 + seed % 7, 80)).astype(np.uint8)
        Image.fromarray(picture).save(file, lossless=True)
    return PhotographsBed(cache, resolution=32)


def test_the_sky_is_smooth_and_above(scene):
    _, sky, distance = scene
    assert sky[:17].mean() > 0.95 and sky[33:].max() < 0.05
    assert sky[22:38, 33:42].max() < 0.3  # the house
    assert (np.diff(distance[32:].mean(axis=1)) < 0.02).all() and distance[35].mean() > distance[-1].mean() + 0.2
    assert distance[:15].min() > 0.9 and distance.min() > 0


def test_no_weather_leaves_pictures_as_they_are(scene):
    np.testing.assert_allclose(applied(scene, ()), scene[0], atol=1 / 255)


def test_night_is_dark_and_blue_and_lamps_stay(scene):
    picture, night = scene[0], applied(scene, ("night",))
    assert (night.mean(-1) < 0.7 * picture.mean(-1)).mean() > 0.95
    ratio = night / np.maximum(picture, 0.02)
    assert ratio[40:, :, 2].mean() > 1.2 * ratio[40:, :, 0].mean()
    assert night[30, 34].max() > 2 * night[45, 60].max()
    darker = applied(scene, ("night",), weather.Degrees(3.0, 0, 0))
    assert darker.mean() < night.mean()


def test_fog_hides_what_is_far(scene):
    picture, fog = scene[0], applied(scene, ("fog",))
    contrast = [image.std(axis=(1, 2)) for image in (picture, fog)]
    kept = contrast[1] / contrast[0]
    assert kept[-3:].mean() > 1.5 * kept[32:38].mean()
    assert np.ptp(applied(scene, ("fog",), weather.Degrees(0, 0, 50.0)), axis=(0, 1)).max() < 0.01
    assert applied(scene, ("fog", "night")).mean() < 0.6 * fog.mean()  # its light is the night's


def test_snow_covers_the_ground_and_falls(scene):
    picture, snow = scene[0], applied(scene, ("snow",))
    assert snow[45:].mean() > picture[45:].mean() + 0.25
    assert np.ptp(snow[45:].mean((0, 1))) < 0.1  # white
    other = applied(scene, ("snow",), seed=1)
    assert 0.01 < (abs(snow - other).max(-1) > 0.05).mean() < 0.6  # the flakes alone
    thin = applied(scene, ("snow",), weather.Degrees(0, 0.1, 0))
    assert thin[45:].mean() < snow[45:].mean()


def test_weather_together_differs_from_one_after_the_other(scene):
    night_fog = applied(scene, ("night", "fog"))
    again = weather.apply(applied(scene, ("night",)).astype(np.float32), *scene[1:], ("fog",), DEGREES, 0) / 255
    assert again.mean() > night_fog.mean() + 0.1
    np.testing.assert_array_equal(night_fog, applied(scene, ("fog", "night")))


def test_counterfactuals_have_the_scene_and_other_weather(bed):
    factual = bed.sample(("night",), 5, seed=3)
    pair = bed.counterfactual(factual, ("night", "snow"))
    np.testing.assert_array_equal(pair.images, bed.sample(("night", "snow"), 5, seed=3).images)
    np.testing.assert_array_equal(bed.counterfactual(pair, ("night",)).images, factual.images)
    np.testing.assert_array_equal(pair.attributes, np.tile([1, 1, 0], (5, 1)))
    assert pair.captions == factual.captions and pair.scenes == factual.scenes
    assert pair.images.shape == (5, 32, 32, 3) and pair.images.dtype == np.uint8


def test_crops_are_squares_of_their_photograph(bed):
    for scene in bed.sample((), 60).scenes:
        width, height = Image.open(fetch(bed.cache_dir) / f"{scene.photograph}.webp").size
        left, upper, right, lower = scene.box
        assert 0 <= left < right <= 1 and 0 <= upper < lower <= 1
        side = (right - left) * width
        assert side == pytest.approx((lower - upper) * height) and side >= 0.6 * min(width, height)


def test_training_sets_share_photographs_and_no_crops(bed):
    sets = [bed.training_sample(context, 6, seed).scenes for seed in range(3) for context in bed.contexts]
    boxes = [scene.box for scenes in sets for scene in scenes]
    assert len(set(boxes)) == len(boxes)
    once = bed.training_sample("obs", len(TRAINING), 0).scenes
    assert {scene.photograph for scene in once} == set(TRAINING)
    assert not (
        TRAINING.keys() & READING.keys() or TRAINING.keys() & HELD_OUT.keys() or READING.keys() & HELD_OUT.keys()
    )
    held_out = bed.sample((), 30, training_seed(0, 0), held_out=True).scenes
    assert {scene.photograph for scene in held_out} <= set(HELD_OUT)


def test_captions_say_nothing_about_the_weather(bed, tmp_path):
    bed.write_folders(tmp_path, 4)
    for context in bed.contexts:
        text = (tmp_path / context / "metadata.csv").read_text()
        assert text.count("a photo of ") == 4
        assert not any(name in text for name in (*bed.concepts, "dark", "white", "winter", "day"))


def test_an_archive_gives_its_members():
    def entry(name, content):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        return header.encode() + content + b"\n" * (len(content) % 2)

    archive = b"!<arch>\n" + entry("debian-binary", b"2.0") + entry("data.tar.xz/", b"four")
    assert archive_member(archive, "data.tar.xz") == b"four"
    with pytest.raises(KeyError):
        archive_member(archive, "control.tar.xz")


def test_resources_are_found_by_their_paths():
    names, offsets = b"", []
    for name in ("a", "bc.webp", "d.txt"):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    contents = struct.pack(">I", 3) + b"one" + struct.pack(">I", 2) + b"zz"
    nodes = [  # the root has folder a; a has bc.webp and a compressed d.txt
        struct.pack(">IHII", 0, 2, 1, 1),
        struct.pack(">IHII", offsets[0], 2, 2, 2),
        struct.pack(">IHHHI", offsets[1], 0, 0, 0, 0),
        struct.pack(">IHHHI", offsets[2], 1, 0, 0, 7),
    ]
    tree = b"".join(node + bytes(8) for node in nodes)
    head = 20
    data = struct.pack(">4sIIII", b"qres", 3, head, head + len(tree), head + len(tree) + len(contents))
    assert list(resources(data + tree + contents + names)) == [("a/bc.webp", b"one")]


def test_fetching_says_where_the_package_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no apt-get
    with pytest.raises(RuntimeError, match=r"gcompris-qt-data_3.1-2_all.deb.*snapshot.debian.org"):
        fetch(tmp_path)
    (tmp_path / "gcompris-qt-data_3.1-2_all.deb").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"SHA-256.*delete"):
        fetch(tmp_path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda bed: bed.sample(("rain",), 1), "rain.*fog"),
        (lambda bed: bed.sample((), 1, seed=-1), "999999"),
    ],
)
def test_errors(bed, call, message):
    with pytest.raises(ValueError, match=message):
        call(bed)


@pytest.mark.skipif(not (CACHE / "photographs").exists(), reason="`write_bed.py photographs` fetches them")
@pytest.mark.slow
def test_readers_find_the_weather_of_other_photographs():
    bed = PhotographsBed(CACHE)
    for interventions in (*bed.contexts.values(), *bed.held_out):
        errors = bed.reading_error(bed.sample(interventions, 100, held_out=True))
        assert max(errors.values()) < 0.15
