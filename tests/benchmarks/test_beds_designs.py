"""The bed of emoji, on packages made here whose drawings' colors say what they show, and on the real ones."""

import base64
import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import write_bed
from beds import designs, emoji
from beds.design_reader import (
    ORIENTATIONS,
    autoencoded,
    cached_reader,
    color_features,
    distort,
    edge_features,
    train_reader,
)
from beds.designs import Designs
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_ctx import embedded_base


TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
MALE, FEMALE = "-200D-2642-FE0F", "-200D-2640-FE0F"
# category; name and code points as man, as woman and as neither
ROLES = [
    ("person-role", "MAN COOK", "1F468-200D-1F373", "WOMAN COOK", "1F469-200D-1F373", "COOK", "1F9D1-200D-1F373"),
    ("person-activity", "MAN WALKING", "1F6B6" + MALE, "WOMAN WALKING", "1F6B6" + FEMALE, "PEDESTRIAN", "1F6B6"),
    ("person-fantasy", "MERMAN", "1F9DC" + MALE, "MERMAID", "1F9DC" + FEMALE, "MERPERSON", "1F9DC"),
    ("person-role", "MAN ELF", "1F9DD" + MALE, "WOMAN ELF", "1F9DD" + FEMALE, "ELF", "1F9DD"),
]
CAPTIONS = ["a cook", "a person walking", "a merperson", "an elf"]
HAND = len(ROLES)


def color(role, gender, tone, vendor):
    return 30 * role + 10 * gender, 40 * tone, 100 * vendor


def entry(role, gender, name, code, category):
    return {
        "name": name,
        "unified": code,
        "short_name": name.lower().replace(" ", "_"),
        "category": "People & Body",
        "subcategory": category,
        "image": f"{role}-{gender}-0.png",
        "skin_variations": {code: {"image": f"{role}-{gender}-{tone}.png"} for tone, code in enumerate(TONES, 1)},
    }


def png(rgb, alpha):
    drawing = np.zeros((64, 64, 4), np.uint8)
    drawing[16:48, 16:48] = (*rgb, alpha)
    file = io.BytesIO()
    Image.fromarray(drawing).save(file, "PNG")
    return file.getvalue()


def write_package(folder, vendor, number):
    entries = [
        entry(role, gender, *row[1 + 2 * gender : 3 + 2 * gender], row[0])
        for role, row in enumerate(ROLES)
        for gender in range(3)
    ]
    entries += [
        entry(HAND, 0, "WAVING HAND SIGN", "1F44B", "hand-fingers-open"),
        entry(0, 0, "MAN WALKING FACING RIGHT", f"1F6B6{MALE}-200D-27A1-FE0F", "person-activity"),
        entry(0, 1, "WOMAN WALKING FACING RIGHT", f"1F6B6{FEMALE}-200D-27A1-FE0F", "person-activity"),
        entry(0, 0, "MAN GOLFING", "1F3CC-FE0F" + MALE, "person-sport"),
        {"name": "RED APPLE", "category": "Food & Drink", "image": "apple.png", "unified": "1F34E"},
        {**entry(0, 0, "HANDSHAKE", "1F91D", "hands"), "skin_variations": {"1F3FB-1F3FC": {"image": "none.png"}}},
    ]
    file = folder / f"emoji-datasource-{vendor}-{emoji.VERSION}.tgz"
    with tarfile.open(file, "w:gz") as archive:

        def add(name, content):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("emoji.json", json.dumps(entries).encode())
        add(f"img/{vendor}/64/apple.png", png((250, 0, number), 255))
        drawn = [*itertools.product(range(len(ROLES)), range(3)), (HAND, 0)]
        for (role, gender), tone in itertools.product(drawn, range(6)):
            rgb = color(role, gender, tone, number)
            add(f"img/{vendor}/64/{role}-{gender}-{tone}.png", png(rgb, 255))
    return base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with packages made here in place of the real ones."""
    made = {vendor: write_package(tmp_path, vendor, number) for number, vendor in enumerate(designs.VENDORS)}
    monkeypatch.setattr(emoji, "INTEGRITY", made)
    return tmp_path


def shown(sample):
    """(n, 3): the color that each image has in its middle."""
    return [tuple(map(int, image[32, 32])) for image in sample.images]


def test_images_show_the_gender_tone_vendor_and_role_that_interventions_ask_for(cache):
    bed = Designs(cache)
    for woman, dark, vendor in itertools.product((0, 1), repeat=3):
        interventions = [name for name, on in zip(("woman", "dark", "vendor"), (woman, dark, vendor)) if on]
        sample = bed.sample(interventions, seed=3)
        assert sample.interventions == tuple(interventions)
        roles = sample.attributes[:, 3].astype(int)
        assert sorted(roles) == [0, 1, 2, 3]
        assert shown(sample) == [color(role, woman, 5 * dark, vendor) for role in roles]
        assert (sample.attributes[:, :3] == [woman, 5 * dark, vendor]).all()
        assert sample.captions == [f"a drawing of {CAPTIONS[role]}" for role in roles]


def test_the_bed_says_what_it_has(cache):
    bed = Designs(cache)
    assert bed.contexts == {"obs": (), "woman": ("woman",), "dark": ("dark",), "vendor": ("vendor",)}
    assert set(bed.held_out) == {
        *itertools.combinations(bed.concepts, 2),
        bed.concepts,
    }
    assert [(attribute.name, attribute.classes, attribute.concepts) for attribute in bed.attributes] == [
        ("gender", 2, ("woman",)),
        ("tone", 6, ("dark",)),
        ("vendor", 2, ("vendor",)),
        ("role", 4, ()),
    ]


def test_fewer_images_are_a_random_choice_of_roles(cache):
    bed = Designs(cache)
    choices = [tuple(bed.sample(("woman",), 2, seed).attributes[:, 3]) for seed in range(30)]
    assert all(len(set(choice)) == 2 for choice in choices) and len(set(choices)) > 5
    assert np.array_equal(bed.sample(("woman",), 2, 7).images, bed.sample(("woman",), 3, 7).images[:2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interventions": ["snow"]}, "snow.*woman"),
        ({"n": 5}, "4 images.*not 5"),
        ({"interventions": ["dark"], "held_out": True}, "only combinations"),
    ],
)
def test_what_there_is_not_is_refused(cache, options, message):
    with pytest.raises(ValueError, match=message):
        Designs(cache).sample(**options)


def test_counterfactuals_are_drawings_of_the_same_role(cache):
    bed = Designs(cache)
    sample = bed.sample(("vendor",), 3, seed=1)
    other = bed.counterfactual(sample, ("dark", "woman"))
    assert other.captions == sample.captions
    assert shown(other) == [color(int(role), 1, 5, 0) for role in sample.attributes[:, 3]]
    back = bed.counterfactual(other, ("vendor",))
    assert np.array_equal(back.images, sample.images) and np.array_equal(back.attributes, sample.attributes)


def test_random_tones_are_drawn_with_the_scene(cache):
    bed = Designs(cache, random_tone=True)
    assert bed.concepts == ("woman", "tone", "vendor")
    samples = [bed.sample(("tone",), seed=seed) for seed in range(20)]
    assert {tone for sample in samples for tone in sample.attributes[:, 1]} == {1, 2, 3, 4, 5}
    before = bed.counterfactual(samples[0], ("woman",))
    assert (before.attributes[:, 1] == 0).all()
    assert np.array_equal(bed.counterfactual(before, ("tone",)).images, samples[0].images)
    assert shown(samples[0]) == [color(int(role), 0, int(tone), 0) for _, tone, _, role in samples[0].attributes]


def test_readers_learn_from_no_image_of_a_context_or_combination(cache):
    bed = Designs(cache)
    images, labels = bed.lessons()
    learned = {image.tobytes() for image in images}
    for size in range(4):
        for interventions in itertools.combinations(bed.concepts, size):
            assert not learned & {image.tobytes() for image in bed.sample(interventions).images}
    # two vendors: 4 roles x 2 genders x 4 tones, 4 roles of no gender x 6 tones, a hand x 6 tones
    assert len(images) == 2 * (32 + 24 + 6)
    gendered, toned = ~np.isnan(labels[:, 0]), ~np.isnan(labels[:, 1])
    assert gendered.sum() == 64 and toned.sum() == 60 and not (gendered & toned).any()
    assert np.bincount(labels[toned, 1].astype(int)).tolist() == [10] * 6
    assert not np.isnan(labels[:, 2]).any() and np.isnan(labels[:, 3]).sum() == 12


def test_transparent_drawings_lie_on_white():
    image = emoji.decode(png((200, 100, 0), 51))
    assert image.shape == (64, 64, 3) and (image[0, 0] == 255).all()
    assert np.abs(image[32, 32].astype(int) - [244, 224, 204]).max() <= 1  # a fifth of the color


def test_a_package_of_other_content_is_refused(cache):
    file = emoji.fetch("google", cache)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        emoji.fetch("google", cache)


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Install Node.js, or put emoji-datasource-google-16.0.0.tgz in"):
        emoji.fetch("google", tmp_path)


def test_the_command_writes_folders_and_a_contact_sheet(cache, tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["write_bed.py", "designs", "--output", str(output), "--n", "3", "--cache_dir", str(cache)]
    )
    write_bed.main()
    assert sorted(path.name for path in (output / "train").iterdir()) == ["dark", "obs", "vendor", "woman"]
    assert len(list((output / "train" / "woman").glob("*.png"))) == 3
    assert Image.open(output / "contact_sheet.png").height >= 8 * 64


@pytest.fixture(scope="module")
def vae():
    """An autoencoder that blurs: that of the shipped base of pictures."""
    vae = AutoencoderKL.from_pretrained(embedded_base("pictures"), subfolder="vae", torch_dtype=torch.float32)
    return vae.requires_grad_(False)


def squares(n, seed):
    """Squares, small or big, in one of three colors; size and color of each."""
    generator = np.random.default_rng(seed)
    size, tone = generator.integers(2, size=n), generator.integers(3, size=n)
    images = np.full((n, 64, 64, 3), 255, np.uint8)
    for image, big, channel in zip(images, size, tone):
        half = 22 if big else 10
        image[32 - half : 32 + half, 32 - half : 32 + half] = 230 * (np.arange(3) == channel)
    return images, np.stack([size, tone], 1).astype(float)


def test_a_reader_learns_each_attribute_where_it_is_known(vae):
    images, labels = squares(80, 0)
    labels[:40, 0], labels[40:, 1] = np.nan, np.nan
    reader = train_reader(images, labels, vae)
    assert [weights.shape[0] for weights in reader.coefficients] == [2, 3]
    others, truth = squares(50, 1)
    generator = np.random.default_rng(0)
    distorted = np.stack([distort(image, generator) for image in others])
    assert (reader.read(others) == truth).all()
    assert (reader.read(distorted) == truth).mean() > 0.95
    assert (reader.read(autoencoded(others, vae, seed=1)) == truth).mean() > 0.95


def test_edges_have_an_orientation_and_a_place():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255  # a vertical edge: its gradient points right, the first orientation
    features = edge_features(image[None])[0].reshape(ORIENTATIONS, 15, 15)
    assert np.flatnonzero(features.max((1, 2))).tolist() == [0]
    # columns 31 and 32 have a slope of a half; of the 8 in a cell, cells from 24, 28 and 32 have one, both and one
    assert np.allclose(features[0, 0, 5:10] ** 2, [0, 1 / 16, 1 / 8, 1 / 16, 0])


def test_colors_are_shares_of_the_image():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[:16] = (255, 0, 0)
    palette = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
    assert np.allclose((color_features(image[None], palette)[0] / 2) ** 2, [0.75, 0.25, 0], atol=1e-5)


def test_a_reader_is_kept_until_its_images_change(tmp_path, vae):
    images, labels = squares(30, 0)
    first = cached_reader(tmp_path, images, labels, vae)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    again = cached_reader(tmp_path, images, labels, vae)
    assert file.stat().st_mtime_ns == written
    assert np.array_equal(first.read(images), again.read(images))
    cached_reader(tmp_path, 255 - images, labels, vae)
    assert len(list(tmp_path.iterdir())) == 2


SOURCES = Path(__file__).parents[2] / "runs" / "sources"


@pytest.mark.skipif(
    len(list(SOURCES.glob(f"emoji-datasource-*-{emoji.VERSION}.tgz"))) < 2,
    reason="the packages are not in runs/sources; `write_bed.py designs` fetches them",
)
def test_the_real_packages():
    bed = Designs(SOURCES)
    assert len(bed.captions) == len(set(bed.captions)) == 70
    assert {"a drawing of a firefighter", "a drawing of an elf", "a drawing of a bald person"} <= set(bed.captions)
    told = {"man", "woman", "men", "women", "male", "female", "dark", "light", *designs.VENDORS}
    assert not told & {word for caption in bed.captions for word in caption.split()}
    images = np.concatenate([bed.sample(rows).images for rows in [*bed.contexts.values(), *bed.held_out]])
    assert len({image.tobytes() for image in images}) == 8 * 70
    assert not {image.tobytes() for image in images} & {image.tobytes() for image in bed.lessons()[0]}


def test_a_base_learns_no_held_out_combination(cache):
    bed = Designs(cache)
    pooled = list(bed.pooled())
    shown = {image.tobytes() for images, _ in pooled for image in images}
    for interventions in bed.held_out:
        assert not any(image.tobytes() in shown for image in bed.sample(interventions).images)
    for interventions in bed.contexts.values():
        assert all(image.tobytes() in shown for image in bed.sample(interventions).images)
    random = Designs(cache, random_tone=True)
    for interventions in random.held_out:
        assert not any(image.tobytes() in shown for image in random.sample(interventions, seed=1).images)
    assert all(len(images) == len(captions) for images, captions in pooled)
    assert [captions for _, captions in pooled[1:]] == [["a drawing of a red apple"]] * 2
