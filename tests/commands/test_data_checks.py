"""Faults that were planted in folders of images are found, and nothing is found where there are none."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from scipy.stats import hypergeom

from diffusers_ctx.commands import main
from diffusers_ctx.commands.checks import DataReport, Problem, check_data, duplicates
from diffusers_ctx.commands.checks.expectations import MEASURED, expectations
from diffusers_ctx.commands.checks.images import ImageTable
from diffusers_ctx.commands.checks.two_sample import pixel_features, two_sample_test


ROOT = Path(__file__).parents[2]


def scene(seed: int) -> np.ndarray:
    """Soft waves of a few colors (48, 48, 3) in [0, 255], other ones for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :48]
    waves = [
        127 + 60 * np.sin(x / rng.uniform(3, 15) + rng.uniform(0, 6)) + 50 * np.cos(y / rng.uniform(3, 15))
        for _ in range(3)
    ]
    return np.stack(waves, axis=-1).clip(0, 255)


def save(file: Path, pixels: np.ndarray, **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file, **options)


def write_captions(folder: Path, words: str) -> None:
    names = sorted(path.name for path in folder.glob("*.png"))
    lines = [f"{name},a photo of field {index} {words}" for index, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """Pairs in `night`, whose captions say so; `same` is as `obs`; few in `snow`, with a copy and a broken file."""
    root = tmp_path_factory.mktemp("data") / "faulty"
    for index in range(60):
        save(root / "obs" / f"scene{index}.png", scene(index))
        save(root / "night" / f"scene{index}.png", scene(index) * 0.4)
        save(root / "same" / f"other{index}.png", scene(1000 + index))
    for index in range(10):
        save(root / "snow" / f"{index}.png", scene(2000 + index) * 0.5 + 120)
    for context, words in {"obs": "", "night": "at midnight", "same": ""}.items():
        write_captions(root / context, words)
    shutil.copy(root / "obs" / "scene3.png", root / "same" / "copy.png")
    again = Image.open(root / "obs" / "scene4.png").resize((36, 36))
    again.save(root / "snow" / "again.jpg", quality=80)
    (root / "snow" / "broken.png").write_bytes(b"no image")
    (root / "notes.txt").write_text("notes")
    return root


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """Numbered files, which are no pairs, of contexts that differ in brightness."""
    root = tmp_path_factory.mktemp("data") / "clean"
    for offset, (context, shade) in enumerate({"obs": 1.0, "night": 0.5}.items()):
        for index in range(40):
            save(root / context / f"{index}.png", scene(100 * offset + index) * shade)
        write_captions(root / context, "by day")
    return root


@pytest.fixture(scope="module")
def report(faulty) -> DataReport:
    return check_data(faulty, resolution=40)


def found(report: DataReport, check: str) -> list:
    return [finding for finding in report.findings if finding.check == check]


def test_images_are_counted(report):
    assert {name: row["images"] for name, row in report.contexts.items()} == {
        "night": 60,
        "obs": 60,
        "same": 61,
        "snow": 11,
    }
    assert report.contexts["same"]["captions"] == 60 and report.contexts["snow"]["captions"] == 0
    assert report.contexts["snow"]["shorter_side"] == [36, 48, 48]


def test_what_cannot_be_read_is_a_problem_and_the_rest_is_checked(report):
    (problem,) = found(report, "unreadable images")
    assert isinstance(problem, Problem) and "1 of 193 images" in problem.message and "broken.png" in problem.message
    captions, passed_over = found(report, "reading")
    assert "notes.txt" in passed_over.message and "1 of 61 images have no caption" in captions.message
    assert not isinstance(passed_over, Problem)


def test_copies_are_found_pixel_for_pixel_and_saved_again(report):
    (exact,) = found(report, "duplicates")
    assert isinstance(exact, Problem) and exact.details == {"images": [["obs/scene3.png", "same/copy.png"]]}
    (near,) = found(report, "near duplicates")
    assert isinstance(near, Problem) and near.details == {"images": [["obs/scene4.png", "snow/again.jpg"]]}


def test_near_copies_do_not_depend_on_how_many_are_compared_at_once(report, monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 7)
    pairs = duplicates.find_duplicates(report.table)
    assert [finding.details for finding in pairs] == [
        finding.details for finding in report.findings if "duplicates" in finding.check
    ]


@pytest.mark.parametrize("change", ["jpeg", "smaller", "larger"])
def test_a_picture_that_was_saved_again_is_near_and_another_is_not(change):
    pictures = [Image.fromarray(scene(seed).astype(np.uint8)) for seed in range(12)]
    again = io.BytesIO()
    if change == "jpeg":
        pictures[0].save(again, "JPEG", quality=70)
    else:
        pictures[0].resize({"smaller": (36, 36), "larger": (90, 90)}[change]).save(again, "PNG")
    pictures.append(Image.open(again))
    thumbnails = [np.asarray(picture.resize((32, 32), Image.Resampling.BOX)) for picture in pictures]
    table = ImageTable(
        contexts=np.array(["obs"] * 12 + ["night"]),
        captions=[""] * 13,
        paths=[None] * 13,
        sizes=np.full((13, 2), 48),
        digests=[str(row) for row in range(13)],
        thumbnails=np.stack(thumbnails),
    )
    (near,) = duplicates.find_duplicates(table)
    assert near.details == {"images": [["obs/0", "night/12"]]}


def test_imbalance_and_small_images_are_found(report):
    (imbalance,) = found(report, "imbalance")
    assert "'same' has 61 images, and 'snow' has 11" in imbalance.message
    (sizes,) = found(report, "sizes")
    assert "1 of 192 images have a side below 40" in sizes.message and "snow/again.jpg" in sizes.message


def test_words_of_one_context_are_found_and_captions_of_some_contexts(report):
    part, words = found(report, "captions")
    assert part.details["shares"] == {"night": 1, "obs": 1, "same": pytest.approx(60 / 61), "snow": 0}
    assert words.details["context"] == "night"
    assert {row["word"] for row in words.details["words"]} == {"at", "midnight"}
    assert words.details["words"][0]["share"] == 1 and words.details["words"][0]["share_elsewhere"] == 0
    # 60 of 60 and 0 of 120 is no chance, with Bonferroni's correction for 3 contexts and all words
    assert hypergeom.sf(59, 180, 60, 60) * 3 * 1000 < 0.01


def test_what_cannot_be_told_is_said_and_with_few_images_that_it_is_open(report):
    assert report.tests["night"].accuracy > 0.9 and report.tests["snow"].accuracy > 0.8
    (untold,) = found(report, "two-sample test")
    assert isinstance(untold, Problem) and untold.details["context"] == "same"
    assert untold.details["p_value"] > 0.05


def test_few_images_leave_it_open(tmp_path):
    for index in range(8):
        save(tmp_path / "obs" / f"a{index}.png", scene(index))
        save(tmp_path / "same" / f"b{index}.png", scene(100 + index))
    for index in range(3):
        save(tmp_path / "fog" / f"c{index}.png", scene(200 + index))
    messages = [finding.message for finding in found(check_data(tmp_path), "two-sample test")]
    assert len(messages) == 2 and "was not tested" in messages[0]
    # of 16, guesses get 12 right in 3.8 % of cases, and 11 in 10.5 %
    assert "is open" in messages[1] and "only 75 % or more would show it" in messages[1]


def test_the_two_sample_test_keeps_its_level():
    """Two halves of one distribution are taken for different in about 1 of 20 cases."""
    features = np.random.default_rng(0).normal(size=(2000, 20))
    rng = np.random.default_rng(1)
    p_values = []
    for seed in range(40):
        rows = rng.permutation(2000)[:60]
        p_values.append(two_sample_test(features, rows[:30], rows[30:], np.arange(2000), seed).p_value)
    assert np.mean(np.array(p_values) <= 0.05) <= 0.125


def test_features_of_pixels_see_color_place_and_texture():
    rng = np.random.default_rng(0)
    noise = rng.integers(100, 156, (1, 32, 32, 3), dtype=np.uint8)
    features = pixel_features(np.concatenate([noise, noise + 40, noise[:, :, ::-1], noise // 8 + 112]))
    assert features.shape == (4, 290) and np.isfinite(features).all()
    assert all(not np.allclose(features[0], other) for other in features[1:])


def test_pairs_are_told_from_numbered_files(report, clean):
    (pairs,) = found(report, "pairs by file name")
    assert "60 images in 'night' and 'obs' have the same file name, and are more alike" in pairs.message
    clean_report = check_data(clean)
    assert not clean_report.problems
    (none,) = found(clean_report, "pairs by file name")
    assert "are no more alike than others" in none.message


def test_expectations_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from result_tables import load, mean, run

    runs = {images: run("ours", images=images) for images in (100, 300, 1000)}
    runs[4000] = load("quad-ours-seed0-n500.json")
    expected = [(n, f"{row['graph']['auroc']:.2f}", f"{mean(row['contexts'], 2):.3f}") for n, row in runs.items()]
    assert [(row.images, f"{row.auroc:.2f}", f"{row.pairs:.3f}") for row in MEASURED] == expected


def test_expectations_name_the_numbers_on_both_sides():
    few, some, many = (expectations(["obs", "night"] * n, [""] * 2 * n) for n in (20, 500, 5000))
    assert "not solved" in few[-1] and "with 100 images" in few[-1] and "300 images" not in few[-1]
    assert "with 300 images" in some[-1] and "; 1,000 images" in some[-1] and "750 steps" in some[0]
    assert "with 4,000 images" in many[-1] and "1500 steps" in many[0]
    assert any("`match_prompt`" in line for line in some)
    held_out = expectations(["obs", "night"] * 280, [""] * 560)
    assert "368 steps" in held_out[0] and held_out[1].startswith("35 images")
    learned_from = expectations(["obs", "night", "snow"] * 70, ["a street"] * 210)
    assert any(line.startswith("186 images to learn from have a caption") for line in learned_from)
    captioned = expectations(["obs", "night"] * 500, ["a street"] * 1000)
    assert not any("`match_prompt`" in line for line in captioned)


def test_the_command_prints_draws_and_exits_with_1(faulty, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["check", str(faulty), "--contact_sheet", str(sheet)]) == 1
    output = capsys.readouterr()
    for text in ("4 contexts, 192 images", "\nProblems\n", "\nRemarks\n", "\nWhat to expect\n"):
        assert text in output.out
    assert f"Contact sheet: {sheet}" in output.err
    assert np.asarray(Image.open(sheet)).std() > 10


def test_the_command_prints_json_alone(clean, capfd):
    assert main(["check", str(clean), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["contexts"]["obs"]["images"] == 40 and report["problems"] == []
    assert report["two_sample_tests"]["night"]["accuracy"] > 0.9


def test_what_cannot_be_trained_on_is_one_sentence(tmp_path, capsys):
    save(tmp_path / "night" / "a.png", scene(0))
    assert main(["check", str(tmp_path)]) == 1
    assert "There is no observational context 'obs'" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "nigth")]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_without_scikit_learn_all_else_is_checked(clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = check_data(clean)
    assert report.tests == {} and "diffusers-ctx[eval]" in found(report, "two-sample test")[0].message


def test_a_table_of_images_is_checked_too(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(4)]
    columns = {"image": pictures, "context": ["obs", "obs", "night", "night"]}
    Dataset.from_dict(columns, features=Features(image=ImageFeature(), context=Value("string"))).to_parquet(
        tmp_path / "train.parquet"
    )
    assert check_data(tmp_path).table.names == ["night", "obs"]


def test_white_is_in_the_last_bin():
    features = pixel_features(np.full((1, 32, 32, 3), 255, dtype=np.uint8))[0]
    histograms = features[8 * 8 * 3 + 8 * 8 :][:24].reshape(8, 3)
    np.testing.assert_array_equal(histograms, np.eye(8)[:, [7] * 3])
