import json
import warnings

import huggingface_hub
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from diffusers_ctx.data import concepts_of, context_mask, interventions_of, load_context_dataset, quad


def picture(shade=0):
    return PILImage.fromarray(np.full((4, 4, 3), shade, dtype=np.uint8))


def write(root, contents, step=10):
    """Writes images from {context: [file names]}, each of its own shade of grey; returns the shades by path."""
    shades = {}
    for context, names in contents.items():
        (root / context).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / context / name
            path.parent.mkdir(exist_ok=True)
            shades[path] = step * (len(shades) + 1)
            picture(shades[path]).save(path)
    return shades


def shades_of(dataset):
    return [row["image"].getpixel((0, 0))[0] for row in dataset]


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    write(root, {"obs": ["a.png", "b.png", "c.png"], "night": ["a.png"], "snow": ["x.png", "y.png"]})
    return root


@pytest.fixture
def table():
    return Dataset.from_dict(
        {
            "image": [picture(10), picture(20), picture(30)],
            "context": ["obs", "night", "obs"],
            "text": ["a street", None, "a square"],
            "width": [4, 4, 4],
        },
        features=Features(
            {"image": Image(), "context": Value("string"), "text": Value("string"), "width": Value("int64")}
        ),
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


# Names


def test_interventions_of_a_context():
    assert interventions_of("obs") == ()
    assert interventions_of("plain", obs_context="plain") == ()
    assert interventions_of("night") == ("night",)
    assert interventions_of("snow+night") == ("snow", "night")


@pytest.mark.parametrize("context", ["night+", "+night", "", "night+night", "night+obs"])
def test_a_context_that_names_no_interventions(context):
    with pytest.raises(ValueError, match="does not name its interventions"):
        interventions_of(context)


def test_concepts_are_sorted_and_unique():
    assert concepts_of(["snow", "obs", "night+fog", "snow", "night"]) == ["fog", "night", "snow"]


def test_context_mask():
    mask = context_mask(["obs", "snow", "night+snow", "night"], ["snow", "night"])
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    assert context_mask(["plain"], ["snow"], obs_context="plain").tolist() == [[0]]


def test_context_mask_of_an_unknown_concept():
    with pytest.raises(ValueError, match=r"'fog'; known are \['snow'\]"):
        context_mask(["fog"], ["snow"])


# Folders


def test_folders_become_rows(photos):
    dataset = load_context_dataset(photos)
    assert dataset.column_names == ["image", "context", "text"]
    assert list(dataset["context"]) == ["night", "obs", "obs", "obs", "snow", "snow"]
    assert shades_of(dataset) == [40, 10, 20, 30, 50, 60]
    assert set(dataset["text"]) == {""}
    assert load_context_dataset(str(photos))["context"][:] == dataset["context"][:]


def test_images_are_read_as_rgb(photos):
    PILImage.new("L", (4, 4), 7).save(photos / "night" / "grey.png")
    PILImage.new("RGBA", (4, 4), (7, 8, 9, 255)).save(photos / "night" / "transparent.png")
    images = load_context_dataset(photos)["image"]
    assert {image.mode for image in images} == {"RGB"}
    assert images[1].getpixel((0, 0)) == (7, 7, 7)
    assert images[2].getpixel((0, 0)) == (7, 8, 9)


def test_captions_from_csv_and_jsonl(photos):
    (photos / "obs" / "metadata.csv").write_text('file_name,text\nc.png,"a street, in Lisbon"\na.png,NA\n')
    lines = [{"file_name": "y.png", "text": "é"}, {"file_name": "x.png", "text": None}]
    (photos / "snow" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    with pytest.warns(UserWarning, match=r"1 of 3 images have no caption in .*metadata.csv.*: b.png"):
        dataset = load_context_dataset(photos)
    # a metadata file neither drops images that it does not name nor folders that have none
    assert list(dataset["context"]) == ["night", "obs", "obs", "obs", "snow", "snow"]
    assert list(dataset["text"]) == ["", "NA", "", "a street, in Lisbon", "", "é"]


def test_captions_under_another_name(photos):
    (photos / "obs" / "metadata.csv").write_text("file_name,caption\na.png,a street\nb.png,\nc.png,\n")
    assert load_context_dataset(photos, text_column="caption")["text"][1] == "a street"
    with pytest.raises(ValueError, match=r"metadata.csv lacks \['text'\] .*'caption'.*`text_column`"):
        load_context_dataset(photos)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"metadata.csv": "name,text\na.png,t\n"}, r"metadata.csv lacks \['file_name'\]"),
        ({"metadata.csv": "file_name,text\nz.png,t\n"}, r"metadata.csv names images that are not there: .*z.png"),
        ({"metadata.jsonl": "{'file_name': 'a.png'}\n"}, "metadata.jsonl cannot be read"),
        ({"metadata.csv": "file_name,text\n", "metadata.jsonl": ""}, "both metadata.csv and metadata.jsonl"),
        ({"metadata.csv": "file_name,text\na.png,t\na.png,u\n"}, "names images more than once: a.png"),
        ({"metadata.csv": "file_name,text\na.png,a street, at night\n"}, r"Row 1 of .* has more fields .*quotes"),
        ({"metadata.csv": "file_name,text\na.png,t\nb.png\n"}, r"Row 2 of .* has fewer fields"),
        ({"metadata.csv": "file_name,text\n"}, "metadata.csv names no image; fill it, or remove it"),
        ({"metadata.jsonl": "5\n"}, "Row 1 of .* is 5; write one JSON object a line"),
        (
            {"metadata.jsonl": '{"file_name": null, "text": "t"}\n'},
            "the image None and the caption 't', not texts",
        ),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": ["t"]}\n'}, r"the caption \['t'\], not texts"),
        ({"metadata.csv": "file_name,text\na.png," + "t" * 200_000 + "\n"}, "cannot be read .*comma-separated values"),
        (
            {"a.txt": "a street"},
            r"Text files beside images are not read .*a.txt; write captions into",
        ),
        ({"../metadata.csv": "file_name,text\nobs/a.png,t\n"}, "lies beside the contexts' folders"),
    ],
)
def test_metadata_files_that_are_wrong(photos, files, message):
    for name, content in files.items():
        (photos / "obs" / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_context_dataset(photos)


def test_folder_names_that_confuse_the_datasets_library(tmp_path):
    root = tmp_path / "all [1]*"
    shades = write(
        root, {"obs": ["a.png", "sub/b.PNG"], "test": ["train_1.jpg"], ".cache": ["c.png"], "__x": ["d.png"]}
    )
    (root / "obs" / "._a.png").write_bytes(b"no image")
    (root / "obs" / "notes.txt").write_text("no image either")
    dataset = load_context_dataset(root)
    assert list(dataset["context"]) == ["obs", "obs", "test"]
    assert shades_of(dataset) == list(shades.values())[:3]


def test_a_context_whose_name_makes_concepts_of_a_slip(photos):
    write(photos, {"night + snow": ["a.png"]})
    with pytest.raises(ValueError, match="joined by '\\+' without spaces"):
        load_context_dataset(photos)


def test_a_concept_that_occurs_in_compositions_alone_may_be_a_slip(photos):
    write(photos, {"nihgt+snow": ["a.png"]})
    with pytest.warns(UserWarning, match=r"\['nihgt'\] have no context of their own, only compositions; .* spelled"):
        load_context_dataset(photos)


@pytest.mark.filterwarnings("ignore:The concepts \\['fog'\\] have no context of their own")
def test_contexts_of_several_interventions(photos):
    write(photos, {"night+snow": ["a.png"], "fog+snow": ["a.png"]})
    dataset = load_context_dataset(photos)
    assert concepts_of(dataset["context"]) == ["fog", "night", "snow"]
    kept = load_context_dataset(photos, concepts=["snow", "night"])
    assert set(kept["context"]) == {"obs", "night", "snow", "night+snow"}
    with pytest.raises(ValueError, match=r"\['fog'\] were intervened on only together.*'fog\+snow'"):
        load_context_dataset(photos, concepts=["fog"])
    write(photos, {"snow+night": ["a.png"]})
    with pytest.raises(ValueError, match=r"'night\+snow' and 'snow\+night' have the same interventions; merge"):
        load_context_dataset(photos)


def test_concepts_restrict_contexts(photos):
    assert set(load_context_dataset(photos, concepts=["snow"])["context"]) == {"obs", "snow"}


def test_a_context_that_is_not_kept_may_be_broken(photos):
    (photos / "empty").mkdir()
    truncate(photos / "night" / "a.png")
    assert len(load_context_dataset(photos, concepts=["snow"])) == 5


def test_the_observational_context_can_have_another_name(photos):
    (photos / "obs").rename(photos / "plain")
    dataset = load_context_dataset(photos, obs_context="plain")
    assert concepts_of(dataset["context"], "plain") == ["night", "snow"]


def test_at_most_so_many_samples_per_context(tmp_path):
    write(tmp_path, {"obs": [f"{index}.png" for index in range(9)], "night": ["a.png", "b.png"]})
    draws = [load_context_dataset(tmp_path, max_samples_per_context=3, seed=seed) for seed in (0, 0, 1, 2)]
    for dataset in draws:
        assert list(dataset["context"]) == ["night"] * 2 + ["obs"] * 3
    shades = [tuple(shades_of(dataset)) for dataset in draws]
    assert shades[0] == shades[1]
    assert len(set(shades)) > 1
    assert all(len(set(drawn)) == 5 for drawn in shades)


def test_what_quad_writes_is_read_back(tmp_path):
    root = quad.write_folders(tmp_path / "quad", n=2, seed=40)
    dataset = load_context_dataset(root)
    assert concepts_of(dataset["context"]) == sorted(quad.CONCEPTS)
    for offset, (context, interventions) in enumerate(quad.contexts().items()):
        sample = quad.generate(interventions, n=2, seed=40 + offset)
        rows = [row for row in dataset if row["context"] == context]
        assert [row["text"] for row in rows] == sample.captions
        np.testing.assert_array_equal(np.stack([np.asarray(row["image"]) for row in rows]), sample.images)


# Datasets


def test_a_dataset_in_memory(table):
    dataset = load_context_dataset(table)
    assert dataset.column_names == ["image", "context", "text"]
    assert dataset["context"][:] == ["obs", "night", "obs"]
    assert dataset["text"][:] == ["a street", "", "a square"]
    assert shades_of(dataset) == [10, 20, 30]


def test_columns_of_other_names_and_class_labels(table):
    features = Features({"photo": Image(), "regime": ClassLabel(names=["night", "obs"]), "caption": Value("string")})
    renamed = Dataset.from_dict(
        {"photo": table["image"][:], "regime": [1, 0, 1], "caption": ["a", "b", "c"]}, features=features
    )
    names = {"image_column": "photo", "context_column": "regime"}
    dataset = load_context_dataset(renamed, text_column="caption", **names)
    assert dataset["context"][:] == ["obs", "night", "obs"]
    assert dataset["text"][:] == ["a", "b", "c"]
    assert load_context_dataset(renamed, **names)["text"][:] == ["", "", ""]


def test_a_selected_and_formatted_dataset(table):
    dataset = load_context_dataset(table.select([2, 1]).with_format("numpy"))
    assert shades_of(dataset) == [30, 20]
    assert dataset["context"][:] == ["obs", "night"]


def test_a_split_or_configuration_that_is_not_there(table, tmp_path):
    table.to_parquet(tmp_path / "train.parquet")
    for wrong in ({"split": "test"}, {"name": "large"}):
        with pytest.raises(ValueError, match="choose with `dataset_config_name` and `dataset_split`"):
            load_context_dataset(tmp_path, cache_dir=tmp_path / "cache", **wrong)


def test_a_folder_of_parquet_files(table, tmp_path):
    table.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    dataset = load_context_dataset(tmp_path / "hub", cache_dir=tmp_path / "cache")
    assert dataset.column_names == ["image", "context", "text"]
    assert shades_of(dataset) == [10, 20, 30]
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(ValueError, match="Unknown split"):
        load_context_dataset(tmp_path / "hub", cache_dir=tmp_path / "cache", split="validation")


def test_columns_that_are_missing_or_hold_something_else(table):
    for column in ("image", "context"):
        with pytest.raises(ValueError, match=rf"no column \['{column}'\], only .*'width'.*`{column}_column`"):
            load_context_dataset(table.remove_columns(column))
    with pytest.raises(ValueError, match=r"no column \['caption'\].*`text_column`"):
        load_context_dataset(table, text_column="caption")
    with pytest.raises(ValueError, match=r"'width' holds .*no images; cast it"):
        load_context_dataset(table, image_column="width")
    with pytest.raises(ValueError, match="one caption per image"):
        load_context_dataset(table, text_column="width")
    with pytest.raises(ValueError, match=r"Row 1 has None in the column 'text'; give each row"):
        load_context_dataset(table, context_column="text")


def test_sources_of_another_kind(table):
    with pytest.raises(TypeError, match=r"DatasetDict.*one split"):
        load_context_dataset(DatasetDict(train=table))


# Everything that would stop a run


def test_a_folder_that_does_not_exist(tmp_path):
    for missing in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere'; check the path"):
            load_context_dataset(missing)


def test_a_name_that_is_neither_a_folder_nor_a_dataset(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is no folder here, .*check the path or the name"):
        load_context_dataset("nobody/nothing")


def test_no_observational_context(photos, table):
    (photos / "obs").rename(photos / "observed")
    with pytest.raises(ValueError, match=r"'obs'; found \['night', 'observed', 'snow'\].*`obs_context`"):
        load_context_dataset(photos)
    with pytest.raises(ValueError, match=r"'clear'; found \['night', 'obs'\]"):
        load_context_dataset(table, obs_context="clear")


def test_no_concept(tmp_path, photos):
    write(tmp_path / "alone", {"obs": ["a.png"]})
    with pytest.raises(ValueError, match="Only the observational context 'obs' was found; add at least one"):
        load_context_dataset(tmp_path / "alone")
    with pytest.raises(ValueError, match=r"choose one or more of \['night', 'snow'\]"):
        load_context_dataset(photos, concepts=[])


def test_unknown_and_repeated_concepts(photos):
    for unknown in ("rain", "obs"):
        with pytest.raises(ValueError, match=rf"'{unknown}'.*choose one or more of \['night', 'snow'\]"):
            load_context_dataset(photos, concepts=["snow", unknown])
    with pytest.raises(ValueError, match=r"\['snow'\] are named more than once"):
        load_context_dataset(photos, concepts=["snow", "night", "snow"])


def test_an_empty_context(photos):
    (photos / "fog").mkdir()
    (photos / "fog" / "readme.txt").write_text("soon")
    with pytest.raises(ValueError, match="fog holds no images"):
        load_context_dataset(photos)


def test_images_outside_a_context(photos):
    picture().save(photos / "stray.png")
    with pytest.raises(ValueError, match=r"lie directly in .*photos, .*: stray.png. Move each into a sub-folder"):
        load_context_dataset(photos)


def test_unreadable_images_stop_the_run_and_are_named(photos):
    truncate(photos / "obs" / "b.png")
    (photos / "snow" / "x.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (photos / "obs" / "c.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        load_context_dataset(photos)
    message = str(error.value)
    assert "3 of 6 images cannot be read" in message and "skip_unreadable=True" in message
    for name in ("obs/b.png", "obs/c.png", "snow/x.png"):
        assert str(photos / name) in message
    for name in ("obs/a.png", "night/a.png", "snow/y.png"):
        assert str(photos / name) not in message


def test_unreadable_images_are_left_out_when_asked(photos):
    truncate(photos / "obs" / "b.png")
    (photos / "snow" / "x.png").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        dataset = load_context_dataset(photos, skip_unreadable=True)
    assert shades_of(dataset) == [40, 10, 30, 60]
    assert list(dataset["context"]) == ["night", "obs", "obs", "snow"]
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert len(messages) == 1
    assert "2 of 6 images" in messages[0]
    assert str(photos / "obs" / "b.png") in messages[0] and str(photos / "snow" / "x.png") in messages[0]


def test_no_warning_without_a_reason(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_context_dataset(photos, skip_unreadable=True)) == 6


def test_skipping_does_not_empty_a_context(photos):
    truncate(photos / "night" / "a.png")
    with pytest.raises(ValueError, match=r"night/a.png.*No image is left in the contexts \['night'\]"):
        load_context_dataset(photos, skip_unreadable=True)


def test_unreadable_images_of_a_dataset_are_named_by_row(table):
    encoded = table.cast_column("image", Image(decode=False)).to_dict()
    encoded["image"][2] = {"bytes": encoded["image"][2]["bytes"][:40], "path": None}
    broken = Dataset.from_dict(encoded, features=table.features)
    with pytest.raises(ValueError, match=r"1 of 3 images.*row 2, context 'obs' \("):
        load_context_dataset(broken)
    encoded["image"][2] = None
    absent = Dataset.from_dict(encoded, features=table.features)
    with pytest.raises(ValueError, match=r"row 2, context 'obs' \(no image\)"):
        load_context_dataset(absent)
    with pytest.warns(UserWarning, match="row 2"):
        assert shades_of(load_context_dataset(absent, skip_unreadable=True)) == [10, 20]


def test_long_lists_of_unreadable_images_are_cut(tmp_path):
    for path in write(tmp_path, {"obs": ["a.png"], "night": [f"{index:02d}.png" for index in range(25)]}, step=1):
        if path.parent.name == "night":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"25 of 26 images.*19\.png.*and 5 more\. Repair"):
        load_context_dataset(tmp_path)


def test_a_limit_that_leaves_nothing(photos):
    with pytest.raises(ValueError, match="`max_samples_per_context` is 0"):
        load_context_dataset(photos, max_samples_per_context=0)
