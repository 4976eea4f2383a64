"""Encoded captions on disk are what the text encoders say, and are encoded once."""

import shutil
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import make_pipeline, make_xl_pipeline

from diffusers_ctx.adapter.backbones import UNetBackbone
from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training.encoding.caption_cache import CaptionCache

from .conftest import create_trainer
from .test_processes import assert_close
from .test_training_script import weights_of


CAPTIONS = ["", "a street", "a house at the sea"]


@pytest.fixture(params=[make_pipeline, make_xl_pipeline], ids=["sd", "sdxl"])
def pipeline(request):
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_captions_are_told_as_without_a_cache(pipeline, tmp_path, dtype):
    for encoder in Conditioner.of(pipeline).text_encoders.values():
        encoder.to(dtype)
    cache = CaptionCache(pipeline, CAPTIONS, tmp_path)
    asked = [CAPTIONS[2], "", "", CAPTIONS[1]]
    expected, got = Conditioner.of(pipeline).encode_captions(asked), cache(asked)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        torch.testing.assert_close(got[name], tensor)
    with pytest.raises(KeyError):
        cache(["never announced"])


def test_each_is_encoded_once_for_all_runs_with_the_same_captions_and_encoders(pipeline, tmp_path, monkeypatch):
    encoded = []
    kind = type(Conditioner.of(pipeline))
    encode_captions = kind.encode_captions
    monkeypatch.setattr(
        kind, "encode_captions", lambda self, asked: encoded.extend(asked) or encode_captions(self, asked)
    )
    first = CaptionCache(pipeline, [*CAPTIONS, "a street"], tmp_path)(CAPTIONS)
    assert sorted(encoded[1:]) == sorted(CAPTIONS)  # the first one shows the shapes
    encoded.clear()
    again = CaptionCache(pipeline, reversed(CAPTIONS), tmp_path)(CAPTIONS)
    assert len(encoded) == 1 and all(torch.equal(again[name], first[name]) for name in first)

    with torch.no_grad():
        for encoder in Conditioner.of(pipeline).text_encoders.values():
            for weight in encoder.parameters():
                weight.mul_(1.5)
    changed = CaptionCache(pipeline, CAPTIONS, tmp_path)(CAPTIONS)
    assert not any(torch.allclose(changed[name], first[name]) for name in first)
    CaptionCache(pipeline, CAPTIONS[:2], tmp_path)
    assert len(list(tmp_path.glob("captions-*.arrow"))) == len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("how", ["empty", "cut off", "fewer rows", "other columns", "shorter rows"])
@torch.no_grad()
def test_a_damaged_file_is_made_anew(tmp_path, caplog, how):
    pipeline = make_pipeline()
    CaptionCache(pipeline, CAPTIONS, tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    tables = {
        "fewer rows": {"text": [[0.0] * 24 * 32]},
        "other columns": {"image": [[0.0] * 24 * 32] * 3},
        "shorter rows": {"text": [[0.0] * 24] * 3},
    }
    file.unlink()  # the first one has mapped it
    if how in tables:
        datasets.Dataset.from_dict(tables[how]).map(cache_file_name=str(file))
    else:
        file.write_bytes(content[:-50] if how == "cut off" else b"")
    expected, got = Conditioner.of(pipeline).encode_captions(CAPTIONS), CaptionCache(pipeline, CAPTIONS, tmp_path)
    torch.testing.assert_close(got(CAPTIONS)["text"], expected["text"])
    assert file.read_bytes() == content and f"{file} is damaged and is made anew" in caplog.text
    caplog.clear()
    CaptionCache(pipeline, CAPTIONS, tmp_path)
    assert "damaged" not in caplog.text


def test_what_another_process_encodes_is_waited_for(pipeline, tmp_path):
    with ThreadPoolExecutor() as another:
        waiting = another.submit(CaptionCache, pipeline, CAPTIONS, tmp_path, wait_for_other_process=True)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        assert list(tmp_path.iterdir()) == []
        first = CaptionCache(pipeline, CAPTIONS, tmp_path)(CAPTIONS)
        got = waiting.result(timeout=60)(CAPTIONS)
    assert all(torch.equal(got[name], first[name]) for name in first)


def test_a_disk_without_room_is_named(pipeline, tmp_path, largest_file, monkeypatch):
    size = sum(encoded.nbytes for encoded in Conditioner.of(pipeline).encode_captions(CAPTIONS).values())
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
        with pytest.raises(OSError, match=r"`cache_dir` .* GB free, and encoded data takes"):
            CaptionCache(pipeline, CAPTIONS, tmp_path)
    largest_file(1000)
    with pytest.raises(OSError, match=r"captions-\w+\.arrow could not be written .*choose another `cache_dir`"):
        CaptionCache(pipeline, CAPTIONS, tmp_path)
    assert list(tmp_path.glob("captions-*")) == []


def test_a_run_learns_the_same_from_cached_captions(options, tmp_path, monkeypatch):
    cached = {"cache_latents": True, "cache_dir": str(tmp_path / "cache")}
    asked = []
    kind = UNetBackbone
    encode_captions = kind.encode_captions

    def noted(self, pipeline, texts):
        asked.append(texts)
        return encode_captions(self, pipeline, texts)

    monkeypatch.setattr(kind, "encode_captions", noted)
    for name, changes in (("plain", {}), ("first", cached), ("second", cached)):
        asked.clear()
        create_trainer(options | changes | {"output_dir": str(tmp_path / name)}).train()
        if name == "second":
            assert asked == [[""]]  # for shapes
    for name in ("first", "second"):
        assert_close(weights_of(tmp_path / name), weights_of(tmp_path / "plain"))
