"""Streams of images in contexts: what is taken first, the endless rest of each context, and where both go on."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_ctx.data import stream_rows
from diffusers_ctx.data.streaming import ContextStream, ImageStream, open_stream, take_images


COUNTS = {"night": 9, "obs": 14, "snow": 7}
FEATURES = {"image": datasets.Image(), "context": datasets.Value("string"), "text": datasets.Value("string")}


def png(number: int) -> bytes:
    """An image that has its number in its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def number_of(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def numbered_contexts() -> list[tuple[int, str]]:
    return list(enumerate(context for context, count in COUNTS.items() for _ in range(count)))


def write_parquet(folder: Path, rows: list[tuple[bytes, str]], files: int, **features) -> Path:
    """Rows in turn to each of the files, four to a row group."""
    folder.mkdir()
    for index in range(files):
        table = [
            {"image": {"bytes": content, "path": None}, "context": context, "text": f"in {context}"}
            for content, context in rows[index::files]
        ]
        data = datasets.Dataset.from_list(table, features=datasets.Features(FEATURES | features))
        data.to_parquet(str(folder / f"train-{index}.parquet"), batch_size=4)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The same images in a folder of contexts, in four files whose rows are mixed, and in one that is sorted."""
    root = tmp_path_factory.mktemp("sources")
    for number, context in numbered_contexts():
        (root / "folder" / context).mkdir(parents=True, exist_ok=True)
        (root / "folder" / context / f"{number}.png").write_bytes(png(number))
    rows = [(png(number), context) for number, context in numbered_contexts()]
    mixed = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    write_parquet(root / "mixed", mixed, 4)
    write_parquet(root / "sorted", rows, 1, context=datasets.ClassLabel(names=list(COUNTS)))
    return {name: str(root / name) for name in ("folder", "mixed", "sorted")}


KINDS = pytest.mark.parametrize("kind", ["folder", "mixed", "sorted"])


def seen(stream: ContextStream, images: int) -> list[int]:
    return [number_of(next(stream)[0]) for _ in range(images)]


def numbers_in(context: str) -> list[int]:
    return [number for number, name in numbered_contexts() if name == context]


# the rest of each context


@KINDS
def test_an_epoch_has_each_image_of_the_context_once(sources, kind):
    stream, numbers = open_stream(sources[kind]), numbers_in("obs")
    shown = ContextStream(stream, "obs", shuffle_buffer=4)
    epochs = [seen(shown, len(numbers)) for _ in range(3)]
    assert all(sorted(epoch) == numbers for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3 and numbers not in epochs
    assert seen(ContextStream(stream, "obs", shuffle_buffer=4), len(numbers)) == epochs[0]
    assert seen(ContextStream(stream, "obs", shuffle_buffer=4, seed=1), len(numbers)) != epochs[0]


@KINDS
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_an_epoch(sources, kind, processes):
    stream, numbers = open_stream(sources[kind]), numbers_in("obs")
    shares = []
    for index in range(processes):
        share = ContextStream(stream, "obs", 4, process_index=index, num_processes=processes)
        shares.append([])
        while share.state_dict()["epoch"] == 0:
            shares[-1] += seen(share, 1)
        shares[-1].pop()  # of the next epoch
    assert sorted(number for share in shares for number in share) == numbers and min(map(len, shares)) > 1


@KINDS
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_stream_goes_on_from_its_place(sources, kind, processes):
    share = {"process_index": processes - 1, "num_processes": processes}
    stream = ContextStream(open_stream(sources[kind]), "obs", 4, seed=5, **share)
    places, images = [], []
    for _ in range(30):
        places.append(json.dumps(stream.state_dict()))
        images += seen(stream, 1)
    other = ContextStream(open_stream(sources[kind]), "obs", 4, seed=5, **share)
    for start in (0, 1, 3, 4, 6, 13, 14, 17, 22, 0):
        other.load_state_dict(json.loads(places[start]))
        assert seen(other, 8) == images[start : start + 8], start


def test_two_streams_of_the_same_rows_do_not_disturb_one_another(sources):
    stream = open_stream(sources["mixed"])
    alone = {context: seen(ContextStream(stream, context, 4), 20) for context in COUNTS}
    together = {context: ContextStream(stream, context, 4) for context in COUNTS}
    shown = [(context, number_of(next(other)[0])) for _ in range(20) for context, other in together.items()]
    assert {context: [number for name, number in shown if name == context] for context in COUNTS} == alone


def test_captions_come_along(sources):
    _, caption = next(ContextStream(open_stream(sources["mixed"]), "snow", 4))
    assert caption == "in snow"
    _, caption = next(ContextStream(open_stream(sources["folder"]), "snow", 4))
    assert caption == ""


def test_a_process_without_images_of_a_context_is_told_so(tmp_path):
    write_parquet(tmp_path / "apart", [(png(index), ["obs", "night"][index % 2]) for index in range(8)], 2)
    stream = open_stream(tmp_path / "apart")
    messages = []
    for index in range(2):  # either may be the one that reads the file of night
        try:
            ContextStream(stream, "night", 4, process_index=index, num_processes=2).fill()
        except ValueError as error:
            messages.append(str(error))
    (message,) = messages
    assert re.search(r"no readable image of the context 'night' in this .* \(2 files or shards\)", message)


def test_a_context_that_is_long_in_coming_is_warned_of_and_then_given_up(sources, monkeypatch, caplog):
    monkeypatch.setattr(stream_rows, "_WARN_AFTER", 5)
    ContextStream(open_stream(sources["sorted"]), "obs", 4).fill()  # nine of night come before it
    assert "The last 5 rows of the stream had no image of 'obs'; reading on." in caplog.text
    monkeypatch.setattr(stream_rows, "_GIVE_UP_AFTER", 8)
    with pytest.raises(ValueError, match=r"The last 8 rows of the stream had no image of 'obs'. Add .* or shuffle"):
        ContextStream(open_stream(sources["sorted"]), "obs", 4).fill()
    with pytest.raises(ValueError, match=r"no image of any of \['obs', 'snow'\]"):
        take_images(open_stream(sources["sorted"]), 1, show_progress=False)


# images that cannot be read


@pytest.fixture
def spoilt(tmp_path) -> ImageStream:
    rows = [(png(number), context) for number, context in numbered_contexts()]
    rows[2] = (b"no image", "night")
    return open_stream(write_parquet(tmp_path / "spoilt", rows, 1))


def test_an_unreadable_image_stops_the_stream_or_is_passed_over(spoilt, caplog):
    with pytest.raises(ValueError, match=r"context 'night' \(cannot identify image file.*Repair .* `skip_unreadable`"):
        seen(ContextStream(spoilt, "night", 4), 9)
    stream = ContextStream(spoilt, "night", 4, skip_unreadable=True)
    assert sorted(seen(stream, 8)) == [number for number in numbers_in("night") if number != 2]
    place = stream.state_dict()
    assert "An image cannot be read and is passed over: one without a name, context 'night'" in caplog.text
    other = ContextStream(spoilt, "night", 4, skip_unreadable=True)
    other.load_state_dict(place)
    assert seen(other, 12) == seen(stream, 12)


def test_a_context_with_none_that_can_be_read(tmp_path):
    rows = [(png(0), "obs"), (b"no image", "night")]
    stream = ContextStream(open_stream(write_parquet(tmp_path / "x", rows, 1)), "night", 4, skip_unreadable=True)
    with pytest.raises(ValueError, match="no readable image of the context 'night'"):
        next(stream)


def test_an_unreadable_image_among_the_first(spoilt):
    with pytest.raises(ValueError, match=r"An image of the stream cannot be read: .*'night'.*`skip_unreadable`"):
        take_images(spoilt, 9, concepts=["night", "snow"], show_progress=False)
    with pytest.warns(UserWarning, match="left out: one without a name, context 'night'"):
        taken = take_images(spoilt, 9, concepts=["night", "snow"], skip_unreadable=True, show_progress=False)
    assert Counter(taken["context"]) == {"night": 8, "obs": 9, "snow": 7}


# what is taken first


@KINDS
def test_so_many_of_each_context_are_taken(sources, kind):
    taken = take_images(open_stream(sources[kind]), 8, concepts=["night", "snow"], show_progress=False)
    assert Counter(taken["context"]) == {"night": 8, "obs": 8, "snow": 7}
    assert taken.column_names == ["image", "context", "text"]
    contexts = dict(numbered_contexts())
    numbers = [number_of(image) for image in taken["image"]]
    assert [contexts[number] for number in numbers] == list(taken["context"]) and len(set(numbers)) == len(numbers)


def test_no_more_is_read_than_is_needed(tmp_path):
    rows = [(png(index), ["obs", "night"][index % 2]) for index in range(8)] + [(b"no image", "obs")] * 8
    stream = open_stream(write_parquet(tmp_path / "early", rows, 1))
    assert len(take_images(stream, 4, concepts=["night"], show_progress=False)) == 8


def test_contexts_of_other_concepts_are_left_out_and_joined_ones_taken_along(tmp_path):
    names = ["night+snow", "obs", "fog", "night", "fog+snow", "obs", "snow"] * 2
    stream = open_stream(write_parquet(tmp_path / "joined", [(png(0), name) for name in names], 1))
    taken = take_images(stream, 2, concepts=["night", "snow"], show_progress=False)
    assert Counter(taken["context"]) == {"obs": 2, "night": 2, "snow": 2, "night+snow": 2}


def test_concepts_of_text_must_be_named_and_those_of_labels_need_not(sources):
    with pytest.raises(ValueError, match=r"column 'context' holds text.*name the `concepts`"):
        take_images(open_stream(sources["mixed"]), 2, show_progress=False)
    for kind in ("sorted", "folder"):
        assert len(take_images(open_stream(sources[kind]), 2, show_progress=False)) == 6


@pytest.mark.parametrize(
    ("contexts", "concepts", "message"),
    [
        (["night", "snow"], ["night"], r"no observational context 'obs'; found \['night'\]"),
        (["obs", "snow"], ["snow", "night"], r"`concepts` is \['snow', 'night'\]; choose one or more of \['snow'\]"),
        (["obs", "night+"], ["night"], r"The context 'night\+' does not name its interventions"),
        (["obs", None], ["night"], "A row has None in the column 'context'"),
    ],
)
def test_contexts_that_cannot_be(tmp_path, contexts, concepts, message):
    stream = open_stream(write_parquet(tmp_path / "wrong", [(png(0), name) for name in contexts], 1))
    with pytest.raises(ValueError, match=message):
        take_images(stream, 2, concepts=concepts, show_progress=False)


def test_a_label_that_no_image_has(tmp_path):
    labels = datasets.ClassLabel(names=["obs", "night", "snow"])
    rows = [(png(0), "obs"), (png(1), "night")]
    stream = open_stream(write_parquet(tmp_path / "labels", rows, 1, context=labels))
    with pytest.raises(ValueError, match=r"no images of the contexts \['snow'\]; add some, or leave out"):
        take_images(stream, 2, show_progress=False)
    assert len(take_images(stream, 2, concepts=["night"], show_progress=False)) == 2


def test_a_row_without_a_label(tmp_path):
    labels = datasets.ClassLabel(names=["obs", "night"])
    stream = open_stream(write_parquet(tmp_path / "none", [(png(0), "obs"), (png(1), -1)], 1, context=labels))
    with pytest.raises(ValueError, match="A row has -1 in the column 'context'; give each row its context's name"):
        ContextStream(stream, "night", 4).fill()


# columns, and other kinds of files


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"context_column": "weather"}, r"no column \['weather'\], only \['image', 'context', 'text'\]"),
        ({"image_column": "text"}, "The column 'text' holds Value.*, no images"),
        ({"text_column": "image"}, "The column 'image' holds Image.*; it should hold text"),
    ],
)
def test_columns_that_cannot_be(sources, columns, message):
    with pytest.raises(ValueError, match=message):
        open_stream(sources["mixed"], **columns)


def test_a_source_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'"):
        open_stream("/nowhere")


def test_a_webdataset(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for number, context in numbered_contexts():
            for kind, content in (("png", png(number)), ("context.txt", context.encode()), ("txt", b"a street")):
                member = tarfile.TarInfo(f"{number:03}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = {"image_column": "png", "context_column": "context.txt", "text_column": "txt"}
    stream = open_stream(tmp_path, **rows)
    taken = take_images(stream, 3, concepts=["night", "snow"], show_progress=False)
    assert Counter(taken["context"]) == dict.fromkeys(COUNTS, 3) and set(taken["text"]) == {"a street"}
    snow = ContextStream(stream, "snow", 4)
    assert sorted(seen(snow, 7)) == numbers_in("snow")
    other = ContextStream(open_stream(tmp_path, **rows), "snow", 4)
    other.load_state_dict(snow.state_dict())
    assert seen(other, 10) == seen(snow, 10)
