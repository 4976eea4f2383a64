"""Folders as people have them: what is read of them, and the one line about the rest."""

import os
import unicodedata
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_ctx.context import ContextModule, intervention_mask
from diffusers_ctx.data import concepts_of, context_mask, interventions_of, load_context_dataset
from diffusers_ctx.data.streaming import open_stream, take_images


@pytest.fixture
def photos(tmp_path):
    """Two contexts of three grey pictures each."""
    root = tmp_path / "photos"
    for context in ("obs", "night"):
        (root / context).mkdir(parents=True)
        for index in range(3):
            picture(root / context / f"{index}.png", 40 + 5 * index)
    return root


def picture(path, shade=40, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade,) * 3).save(path, **options)
    return path


def load(root, **options):
    """The dataset, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_context_dataset(root, **options)
    return dataset, [str(warning.message) for warning in caught if warning.category is UserWarning]


def texts_in(dataset, context):
    return [text for name, text in zip(dataset["context"], dataset["text"]) if name == context]


# captions

CSV = "file_name,text\n0.png,a\n1.png,b\n2.png,c\n"


def write_parquet(path):
    rows = {"file_name": ["0.png", "1.png", "2.png"], "text": ["a", "b", "c"]}
    pa.parquet.write_table(pa.table(rows), path)


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV", "metadata.parquet", "0.caption", "0.CAPTION"])
def test_captions_that_are_read(photos, name):
    file = photos / "night" / name
    if name.endswith("parquet"):
        write_parquet(file)
    elif name.lower().endswith("caption"):
        for index, text in enumerate("abc"):
            file.with_stem(str(index)).write_text(f"{text}\n")
    else:
        file.write_text(CSV)
    dataset, said = load(photos)
    assert texts_in(dataset, "night") == ["a", "b", "c"] and said == []
    taken = take_images(open_stream(photos), 3, show_progress=False)
    assert sorted(texts_in(taken, "night")) == ["a", "b", "c"]


def test_captions_in_sub_folders_name_the_images_beside_them(photos):
    for roll in ("roll1", "roll2"):
        picture(photos / "night" / roll / "x.png")
        (photos / "night" / roll / "metadata.csv").write_text(f"file_name,text\nx.png,{roll}\n")
    (photos / "night" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "top"}\n')
    (photos / "night" / "1.caption").write_text("beside")
    dataset, said = load(photos)
    assert texts_in(dataset, "night") == ["top", "beside", "", "roll1", "roll2"]
    assert said == [f"1 of 5 images have no caption in {photos / 'night'}, and so an empty one: 2.png."]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.csv": CSV, "0.caption": "x"}, "that have a caption elsewhere: 0.png; keep one of each"),
        ({"0.caption": b"\xff\xfe"}, r"0.caption cannot be read \(.*\); write it in UTF-8"),
        ({"metadata.parquet": "no table"}, "metadata.parquet cannot be read .* as a Parquet table"),
        ({"0.txt": "a"}, "Text files beside images are not read .* or name the files `.caption`"),
        ({"../metadata.parquet": ""}, "lies beside the contexts' folders"),
    ],
)
def test_captions_that_are_wrong(photos, files, message):
    for name, content in files.items():
        (photos / "night" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_context_dataset(photos)


@pytest.mark.parametrize(
    "name", ["metadata.tsv", "captions.csv", "captions.json", "meta_cap.json", "9.caption", "labels.xlsx", "notes.txt"]
)
def test_captions_where_nobody_looks_are_said(photos, name):
    (photos / "night" / name).write_text(CSV)
    dataset, (said,) = load(photos)
    assert set(dataset["text"]) == {""}
    assert said == (
        f"Passed over in {photos}: 1 {os.path.splitext(name)[1]} (night/{name}). To use them: captions are read from"
        " metadata.csv, metadata.jsonl, metadata.parquet (file_name,text) and image.caption."
    )


# photos


def test_photos_that_cannot_be_read_are_said_in_one_line(photos):
    for index in range(40):
        (photos / "night" / f"IMG_{index:02}.HEIC").write_bytes(b"x")
    for name in ("a.NEF", "a.svg", "b.svg", "c.mp4", "IMG_0001", "broken.h5"):
        (photos / "obs" / name).write_bytes(b"x")
    (photos / "obs" / "gone.jpg").symlink_to(photos / "nowhere.jpg")
    dataset, (said,) = load(photos)
    assert len(dataset) == 6
    kinds, hints = said.removeprefix(f"Passed over in {photos}: ").split(". To use them: ")
    assert kinds.split(", ")[0] == "40 .heic (night/IMG_00.HEIC)" and set(kinds.split(", ")[1:]) == {
        "1 .nef (obs/a.NEF)",
        "2 .svg (obs/a.svg)",
        "1 .mp4 (obs/c.mp4)",
        "1 file without extension (obs/IMG_0001)",
        "1 .h5 (obs/broken.h5)",
        "1 broken link (obs/gone.jpg)",
    }
    assert hints == "`pip install pillow-heif` reads HEIC; convert other pictures to JPEG or PNG."


def test_a_context_of_photos_that_cannot_be_read_says_which(photos):
    (photos / "snow").mkdir()
    (photos / "snow" / "IMG_0.HEIC").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"1 .heic \(snow/IMG_0.HEIC\)"), pytest.raises(ValueError, match="no images"):
        load_context_dataset(photos)


def test_captions_of_pictures_that_cannot_be_read_do_not_stop_the_rest(photos):
    (photos / "night" / "IMG_0.HEIC").write_bytes(b"x")
    (photos / "night" / "metadata.csv").write_text(CSV + "IMG_0.HEIC,d\n")
    dataset, (said,) = load(photos)
    assert texts_in(dataset, "night") == ["a", "b", "c"]
    assert "1 .heic (night/IMG_0.HEIC)" in said and "`pip install pillow-heif` reads HEIC" in said


def test_linked_folders_are_followed_once(photos, tmp_path):
    for index in range(10):
        picture(tmp_path / "elsewhere" / f"e{index}.png")
    (photos / "night" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "night" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (photos / "night" / "loop").symlink_to(photos / "night", target_is_directory=True)
    (photos / "night" / "all").symlink_to(tmp_path, target_is_directory=True)
    (photos / "snow").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    dataset, (said,) = load(photos)
    contexts = list(dataset["context"])
    assert [contexts.count(name) for name in ("night", "obs", "snow")] == [13, 3, 10]
    assert said == f"Passed over in {photos}: 3 links to what is read already (night/all)."


def test_a_linked_folder_has_its_own_name(photos):
    picture(photos / "night" / "roll" / "r.png")
    (photos / "night" / "a_link").symlink_to(photos / "night" / "roll", target_is_directory=True)
    (photos / "night" / "metadata.csv").write_text(CSV + "roll/r.png,d\n")
    dataset, (said,) = load(photos)
    assert texts_in(dataset, "night") == ["a", "b", "c", "d"]
    assert said == f"Passed over in {photos}: 1 link to what is read already (night/a_link)."


def test_what_other_programs_leave_is_no_photo(photos):
    for folder in (".thumbnails", "@eaDir", "__MACOSX", ".ipynb_checkpoints", ".picasaoriginals", "#recycle"):
        picture(photos / "night" / folder / "0.png")
        picture(photos / folder / "0.png")
    for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store", "IMG_0001.AAE", "0.THM"):
        (photos / "night" / name).write_bytes(b"x")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (photos / name).write_text("x")
    dataset, said = load(photos)
    assert set(dataset["context"]) == {"night", "obs"} and len(dataset) == 6 and said == []


def test_thumbnails_are_said(photos):
    picture(photos / "night" / "thumbnails" / "0.png")
    picture(photos / "thumbs" / "0.png")
    dataset, (said,) = load(photos)
    assert len(dataset) == 6 and "2 folders of thumbnails (thumbs)" in said


# what runs write


@pytest.mark.parametrize(
    "marker",
    [
        "context_adapter_config.json",
        "training_config.json",
        "concepts-in-progress.pt",
        "checkpoint-0/options.json",
        "model_index.json",
        ".training.lock",
    ],
)
@pytest.mark.parametrize("place", ["run", "night/run"])
def test_the_output_of_runs_is_not_trained_on(photos, marker, place):
    picture(photos / place / "validation" / "step-500.png", 64)
    (photos / place / marker).parent.mkdir(exist_ok=True)
    (photos / place / marker).write_text("{}")
    dataset, (said,) = load(photos)
    assert len(dataset) == 6 and set(dataset["context"]) == {"night", "obs"}
    assert said == f"Passed over in {photos}: 1 folder of a run or model ({place})."


def test_the_output_of_evaluations_is_not_trained_on(photos):
    picture(photos / "results" / "samples" / "night" / "0.png")
    (photos / "results" / "settings.json").write_text("{}")
    assert len(load(photos)[0]) == 6


def test_the_folder_of_this_run_is_no_context(photos):
    (photos / "run").mkdir()  # as it is before the first checkpoint
    with pytest.raises(ValueError, match="run holds no images"):
        load_context_dataset(photos)
    dataset, said = load(photos, output_dir=photos / "run")
    assert len(dataset) == 6 and said == []
    assert open_stream(photos, output_dir=str(photos / "run")).contexts == ["night", "obs"]


def test_a_folder_of_runs_is_no_context(photos):
    (photos / "runs" / "a").mkdir(parents=True)
    (photos / "cache").mkdir()
    (photos / "cache" / "latents-0.safetensors").write_bytes(b"x")
    dataset, (said,) = load(photos, output_dir=photos / "runs" / "a")
    assert set(dataset["context"]) == {"night", "obs"}
    assert said == f"Passed over in {photos}: 2 folders of a run or model (cache)."
    picture(photos / "runs" / "a" / "validation" / "step-500.png")  # and as the next run finds it
    (photos / "runs" / "a" / "training_config.json").write_text("{}")
    assert set(load(photos, output_dir=photos / "runs" / "b")[0]["context"]) == {"night", "obs"}


@pytest.mark.parametrize("place", ["", "night"])
def test_a_run_does_not_write_among_the_images(photos, place):
    with pytest.raises(ValueError, match=r"`output_dir` .* holds the images to train on; give .* a folder of its own"):
        load_context_dataset(photos, output_dir=photos / place)


# archives and data files


@pytest.mark.parametrize("place", ["night/backup.tar", "backup.tar", "backups/old.tar", "night/index.parquet"])
def test_a_stray_archive_makes_no_dataset_of_a_folder(photos, place):
    (photos / place).parent.mkdir(exist_ok=True)
    (photos / place).write_bytes(b"\0" * 10240)
    if place.startswith("backups"):
        with (
            pytest.warns(UserWarning),
            pytest.raises(ValueError, match=r"backups holds no images; put .* or remove it"),
        ):
            load_context_dataset(photos)
    else:
        dataset, (said,) = load(photos)
        with pytest.warns(UserWarning, match="Passed over"):
            assert open_stream(photos).contexts == ["night", "obs"]
        assert len(dataset) == 6 and f"1 {os.path.splitext(place)[1]} ({place})" in said


def test_a_dataset_with_pictures_beside_it_stays_one(photos, tmp_path):
    rows = {"image": [str(photos / "obs" / "0.png"), str(photos / "night" / "0.png")], "context": ["obs", "night"]}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(
        tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"
    )
    picture(tmp_path / "hub" / "assets" / "preview.png")
    dataset, (said,) = load(tmp_path / "hub", cache_dir=tmp_path / "cache")
    assert list(dataset["context"]) == ["obs", "night"]
    assert "is read as a dataset because of data/train-00000-of-00001.parquet" in said and "no images of 'obs'" in said


# names

NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))
FORMS = pytest.mark.parametrize(("one", "other"), [(NFC, NFD), (NFD, NFC)])


@FORMS
def test_captions_find_images_in_either_form(photos, one, other):
    picture(photos / "night" / f"{one}.png")
    picture(photos / "obs" / f"{one}.png")
    (photos / "night" / "metadata.csv").write_text(f"{CSV}{other}.png,d\n", encoding="utf-8")
    (photos / "obs" / f"{other}.caption").write_text("e", encoding="utf-8")
    dataset, _ = load(photos)
    assert sorted(texts_in(dataset, "night")) == ["a", "b", "c", "d"] and "e" in texts_in(dataset, "obs")


@FORMS
def test_contexts_and_concepts_have_one_name_in_either_form(photos, one, other):
    (photos / "night").rename(photos / one)
    picture(photos / f"{one}+snow" / "0.png")
    picture(photos / "snow" / "0.png")
    dataset, said = load(photos, concepts=[other, "snow"])
    assert set(dataset["context"]) == {"obs", "snow", NFC, f"{NFC}+snow"} and said == []
    taken = take_images(open_stream(photos), 1, concepts=[other, "snow"], show_progress=False)
    assert set(taken["context"]) == {"obs", "snow", NFC, f"{NFC}+snow"}
    assert concepts_of([one, other]) == [NFC] and interventions_of(one, other) == ()
    assert context_mask([one], [other]).tolist() == [[1]]


@FORMS
def test_columns_and_the_observational_context_in_either_form(photos, one, other):
    files = [str(photos / context / "0.png") for context in ("obs", "night")]
    rows = Dataset.from_dict({"image": files, "context": [other, "night"]}).cast_column("image", ImageFeature())
    assert set(load_context_dataset(rows, obs_context=one)["context"]) == {NFC, "night"}


@FORMS
def test_interventions_and_graphs_in_either_form(one, other):
    assert intervention_mask([one], ["snow", other], 1).tolist() == [[0, 1]]
    assert intervention_mask({one: 0.5}, ["snow", other], 1).tolist() == [[0, 0.5]]
    with pytest.raises(ValueError, match="names a concept twice"):
        intervention_mask([one, other], [one], 1)
    module = ContextModule([one, "snow"], token_dim=4, graph=[(other, "snow")], posterior_width=8)
    assert module.config.concepts == [NFC, "snow"] and module.causal.allowed[1, 0] == 1
    with pytest.raises(ValueError, match="names one twice"):
        ContextModule([one, other], token_dim=4)


def test_two_folders_of_one_name(photos):
    for name in (NFC, NFD):
        picture(photos / name / "0.png")
    with pytest.raises(ValueError, match=r"Two folders in .* have the name 'été', in two Unicode forms; merge them"):
        load_context_dataset(photos)


@pytest.mark.parametrize("place", [b"night/caf\xe9.png", b"caf\xe9/0.png"])
def test_names_that_are_no_utf8_are_named(photos, place):
    path = os.path.join(os.fsencode(photos), place)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write((photos / "obs" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"These names are no UTF-8: .*caf\\xe9.*; rename the files or folders"):
        load_context_dataset(photos)


def test_other_names_that_are_no_utf8_can_be_said(photos):
    with open(os.path.join(os.fsencode(photos), b"night/caf\xe9.heic"), "wb"):
        pass
    _, (said,) = load(photos)
    assert r"1 .heic (night/caf\xe9.heic)" in said and said.encode()


# a phone


def test_a_folder_of_phone_pictures(photos):
    night = photos / "night"
    for file in night.iterdir():
        file.unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    photo, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    photo.save(night / "IMG_0001.JPG", exif=exif)
    photo.save(night / "IMG_0002.Jpeg")
    photo.save(night / "IMG_0003.jpg", format="MPO", save_all=True, append_images=[photo])
    screenshot = photo.convert("RGBA")
    screenshot.save(night / "Screenshot_1.PNG")
    screenshot.putalpha(128)
    screenshot.save(night / "Screenshot_2.png")
    for name in ("a.gif", "b.webp"):
        photo.save(night / name, save_all=True, append_images=[Image.fromarray(pixels[::-1])])
    for name in ("IMG_0004.HEIC", "IMG_0005.HEIC", "IMG_0004.MOV", "IMG_0001.AAE", ".DS_Store", "._IMG_0001.JPG"):
        (night / name).write_bytes(b"\0\0\0\x18ftypheic")
    (night / "IMG_0006.JPG").write_bytes(b"")

    with pytest.raises(ValueError, match=r"1 of 11 images cannot be read: .*IMG_0006.JPG \(the file is empty\)"):
        load(photos)
    dataset, said = load(photos, skip_unreadable=True)
    images = {os.path.basename(name): image for name, image in zip(paths(dataset), dataset["image"])}
    assert sorted(images) == [
        *("0.png", "1.png", "2.png"),
        *("IMG_0001.JPG", "IMG_0002.Jpeg", "IMG_0003.jpg"),
        *("Screenshot_1.PNG", "Screenshot_2.png", "a.gif", "b.webp"),
    ]
    assert images["IMG_0001.JPG"].size == (8, 12) and images["IMG_0003.jpg"].size == (12, 8)
    assert (np.asarray(images["Screenshot_1.PNG"]) == pixels).all()
    assert said == [
        f"Passed over in {photos}: 2 .heic (night/IMG_0004.HEIC), 1 .mov (night/IMG_0004.MOV)."
        " To use them: `pip install pillow-heif` reads HEIC.",
        f"1 of 11 images cannot be read: {night / 'IMG_0006.JPG'} (the file is empty). They are left out.",
        "Images are converted to RGB: 2 with several frames (the first is taken), 1 with transparent parts (laid over"
        " white).",
    ]


def paths(dataset):
    return [row["image"]["path"] for row in dataset.cast_column("image", ImageFeature(decode=False))]
