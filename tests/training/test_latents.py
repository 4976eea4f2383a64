"""Images to latents, and the random numbers that make a run repeatable."""

import shutil
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import norm

from diffusers_ctx.pipelines import Conditioner
from diffusers_ctx.training.diffusion.timesteps import sample_timesteps
from diffusers_ctx.training.encoding.images import ImageTransform
from diffusers_ctx.training.encoding.latent_cache import cached
from diffusers_ctx.training.encoding.latents import ContextLatents, LatentBatches, encode_images
from diffusers_ctx.training.run.keyed_noise import KeyedNoise


def gradient(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=2).round().astype(np.uint8))


# images to pixels


@pytest.mark.parametrize(("width", "height"), [(128, 64), (64, 128), (96, 32)])
def test_the_shorter_side_is_resized_and_the_longer_one_cropped(width, height):
    pixels = ImageTransform(32, center_crop=True, seed=0)(gradient(width, height), index=0)
    assert pixels.shape == (3, 32, 32)
    red, green = pixels[0].mean(dim=0), pixels[1].mean(dim=1)
    kept = min(width, height) / max(width, height)  # of the longer side, around its middle
    longer, shorter = (red, green) if width > height else (green, red)
    for line, span in ((longer, kept), (shorter, 1.0)):
        expected = torch.linspace(-span, span, 65)[1::2]  # centres of 32 equal parts
        torch.testing.assert_close(line, expected, atol=0.05, rtol=0)


def test_pixels_are_scaled_to_minus_one_and_one():
    image = Image.fromarray(np.array([[[0, 128, 255]]], dtype=np.uint8)).resize((40, 32))
    pixels = ImageTransform(32, center_crop=True, seed=0)(image, index=0)
    expected = torch.tensor([-1, 128 / 127.5 - 1, 1])[:, None, None].expand(3, 32, 32)
    torch.testing.assert_close(pixels, expected)


def test_other_kinds_of_images_become_rgb():
    pixels = ImageTransform(32, center_crop=True, seed=0)(Image.new("L", (40, 32), 255), index=0)
    assert torch.equal(pixels, torch.ones(3, 32, 32))


def test_the_place_of_a_random_crop_is_the_images_own():
    transform, image = ImageTransform(32, center_crop=False, seed=0), gradient(128, 32)
    crops = [transform(image, index) for index in range(40)]
    again = [transform(image, index) for index in reversed(range(40))][::-1]
    assert all(map(torch.equal, crops, again))
    starts = torch.stack([crop[0, 0, 0] for crop in crops])
    assert starts.min() < -0.8 and starts.max() > 0.3  # from the left end to the last place that has 32 pixels left
    assert len(starts.unique()) > 20
    assert not torch.equal(ImageTransform(32, center_crop=False, seed=1)(image, 0), crops[0])


@pytest.mark.parametrize(("width", "height"), [(128, 64), (50, 90)])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_geometry_is_that_of_the_pixels(width, height, flipped):
    transform, image = ImageTransform(32, center_crop=False, seed=0), gradient(width, height)
    for index in range(5):
        pixels = transform(image, index)
        original, (top, left), size = transform.geometry(image, index, flipped).view(3, 2).tolist()
        assert original == [height, width] and size == [32, 32]
        # where the crop's middle lies in the whole image, from 0 to 1
        seen_left, seen_top = ((pixels[channel].mean() + 1) / 2 for channel in (0, 1))
        scale = 32 / min(width, height)
        expected = 1 - seen_left if flipped else seen_left
        assert (left + 16) / (width * scale) == pytest.approx(expected.item(), abs=0.02)
        assert (top + 16) / (height * scale) == pytest.approx(seen_top.item(), abs=0.02)


# pixels to latents


@pytest.fixture
def dataset() -> datasets.Dataset:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]
    columns = {"image": images, "context": ["obs", "night", "obs", "snow", "night"], "text": list("abcde")}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(mode="RGB"))


@pytest.mark.parametrize("random_flip", [False, True])
def test_encoding_is_the_autoencoders_scaled(plain_pipeline, dataset, random_flip):
    vae = plain_pipeline.vae
    masks = torch.tensor([[0.0, 0], [1, 0], [0, 0], [0, 1], [1, 0]])
    latents = encode_images(
        vae, dataset, masks, ImageTransform(32, True, 0), random_flip, batch_size=2, show_progress=False
    )
    assert latents.mean.shape == latents.std.shape == (2 if random_flip else 1, 5, 4, 16, 16)
    for row in range(5):
        pixels = torch.from_numpy(np.array(dataset[row]["image"])).permute(2, 0, 1)[None] / 127.5 - 1
        for view, seen in enumerate([pixels, pixels.flip(-1)][: len(latents.mean)]):
            posterior = vae.encode(seen).latent_dist
            torch.testing.assert_close(latents.mean[view, row], posterior.mean[0].detach() * 0.18215)
            torch.testing.assert_close(latents.std[view, row], posterior.std[0].detach() * 0.18215)
    assert len(latents) == 5 and latents.contexts == ["obs", "night", "obs", "snow", "night"]
    one = latents.mean_batch(torch.tensor([3]))
    assert one.captions == ["d"] and one.mask.tolist() == [[0, 1]] and torch.equal(one.latents, latents.mean[0, [3]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_read_the_same_images_and_no_random_number_is_drawn(plain_pipeline, dataset, num_workers):
    def run(**options) -> ContextLatents:
        transform = ImageTransform(16, center_crop=False, seed=0)
        masks = torch.zeros(len(dataset), 2)
        return encode_images(
            plain_pipeline.vae, dataset, masks, transform, True, batch_size=2, show_progress=False, **options
        )

    expected, state = run(), torch.get_rng_state()
    latents = run(num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("mean", "std", "geometry"):
        assert torch.equal(getattr(latents, name), getattr(expected, name))


def encode(vae: AutoencoderKL, dataset: datasets.Dataset, cache_dir: Path, **changes) -> ContextLatents:
    transform = ImageTransform(32, changes.get("center_crop", True), seed=0)
    random_flip = changes.get("random_flip", False)
    return encode_images(vae, dataset, torch.zeros(len(dataset), 2), transform, random_flip, cache_dir=cache_dir)


def test_latents_are_kept_and_found_again(plain_pipeline, dataset, tmp_path):
    first = encode(plain_pipeline.vae, dataset, tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    written = file.stat().st_mtime_ns
    again = encode(plain_pipeline.vae, dataset, tmp_path / "new")
    assert torch.equal(first.mean, again.mean) and torch.equal(first.std, again.std)
    assert list((tmp_path / "new").iterdir()) == [file] and file.stat().st_mtime_ns == written
    # that the file is what is read
    save_file({"mean": first.mean + 1, "std": first.std, "geometry": first.geometry}, file)
    assert torch.equal(encode(plain_pipeline.vae, dataset, tmp_path / "new").mean, first.mean + 1)


def damage(file: Path, how: str) -> None:
    """Replaces a file by what a full disk, a broken copy or a mix-up leaves."""
    content = file.read_bytes()
    file.unlink()  # a run may have mapped it
    if how == "other tensors":
        save_file({"mean": torch.zeros(2), "std": torch.zeros(2), "geometry": torch.zeros(2)}, file)
    elif how == "other names":
        save_file({"pixels": torch.zeros(2)}, file)
    else:
        file.write_bytes(
            {"empty": b"", "cut off": content[:-50], "header alone": content[:20], "junk": b"x" * 99}[how]
        )


DAMAGES = ["empty", "cut off", "header alone", "junk", "other tensors", "other names"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_made_anew(plain_pipeline, dataset, tmp_path, caplog, how):
    first = encode(plain_pipeline.vae, dataset, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damage(file, how)
    again = encode(plain_pipeline.vae, dataset, tmp_path)
    assert torch.equal(first.mean, again.mean) and file.read_bytes() == whole
    assert f"{file} is damaged and is made anew" in caplog.text


def test_a_damaged_file_is_not_read_while_another_process_makes_it_anew(tmp_path):
    shapes = {"mean": (3,)}
    cached(tmp_path, "key", lambda: {"mean": torch.zeros(3)}, shapes=shapes)  # its file is longer than 50 bytes
    (file,) = tmp_path.iterdir()
    damage(file, "cut off")
    with ThreadPoolExecutor() as another:
        waiting = another.submit(cached, tmp_path, "key", pytest.fail, wait_for_other_process=True, shapes=shapes)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        cached(tmp_path, "key", lambda: {"mean": torch.ones(3)}, shapes=shapes)
        assert waiting.result(timeout=60)["mean"].tolist() == [1, 1, 1]


def test_a_folder_that_cannot_be_written_to_is_found_before_anything_is_encoded(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"`cache_dir` .*taken cannot be written to .*choose another"):
        cached(tmp_path / "taken", "key", lambda: pytest.fail("it was encoded"))


def test_nothing_is_left_of_what_could_not_be_written_whole(tmp_path, largest_file):
    largest_file(1000)
    message = (
        r"latents-key\.safetensors could not be written \(.*File too large.*choose another `cache_dir`, or leave out"
    )
    with pytest.raises(OSError, match=message):
        cached(tmp_path, "key", lambda: {"mean": torch.zeros(1000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("random_flip", [False, True])
def test_a_disk_without_room_is_found_before_anything_is_encoded(
    plain_pipeline, dataset, tmp_path, monkeypatch, random_flip
):
    def encode_all() -> None:
        masks, transform = torch.zeros(len(dataset), 2), ImageTransform(32, True, 0)
        encode_images(
            plain_pipeline.vae, dataset, masks, transform, random_flip, cache_dir=tmp_path, image_features=features
        )

    def have(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    features = Conditioner.of(plain_pipeline).backbone_features()
    # of latents, features and geometry, by hand
    size = 4 * 5 * (1 + random_flip) * (2 * 4 * 16 * 16 + 16 * 8 * 8 + 6)
    have(size - 1)
    message = r"`cache_dir` .* GB free, and encoded data takes .*; free some, choose another `cache_dir`"
    with pytest.raises(OSError, match=message):
        encode_all()
    assert list(tmp_path.iterdir()) == []
    have(size)
    encode_all()
    (file,) = tmp_path.iterdir()
    assert 4 * sum(x.numel() for x in load_file(file).values()) == size


def test_other_images_weights_or_settings_are_encoded_anew(plain_pipeline, dataset, tmp_path):
    vae = plain_pipeline.vae
    expected = encode(vae, dataset, tmp_path)
    for changes in ({"center_crop": False}, {"random_flip": True}):
        encode(vae, dataset, tmp_path, **changes)
    reordered = encode(vae, dataset.select([1, 0, 2, 3, 4]), tmp_path)
    torch.testing.assert_close(reordered.mean, expected.mean[:, [1, 0, 2, 3, 4]])
    with torch.no_grad():
        next(vae.parameters()).add_(0.1)
    assert not torch.equal(encode(vae, dataset, tmp_path).mean, expected.mean)
    assert len(list(tmp_path.iterdir())) == 5


def test_images_in_files_are_known_by_their_content_and_not_their_name(plain_pipeline, tmp_path):
    def folder(name: str, shade: int) -> datasets.Dataset:
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(tmp_path / name / "0.png")
        columns = {"image": [str(tmp_path / name / "0.png")], "context": ["obs"], "text": [""]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    for name, shade in (("a", 10), ("b", 10), ("c", 200)):
        encode(plain_pipeline.vae, folder(name, shade), tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_draws_are_mean_plus_std_times_noise_of_the_view_that_the_coin_chose():
    mean, std = torch.randn(2, 3, 4, 2, 2), torch.rand(2, 3, 4, 2, 2)
    features, masks = torch.randn(2, 3, 5, 1, 1), torch.eye(3)
    geometry = torch.arange(36).view(2, 3, 6)
    latents = ContextLatents(mean, std, masks, ["obs"] * 3, list("abc"), geometry, features)
    rows = torch.tensor([2, 0, 2, 1])
    random = KeyedNoise(0, "test", 0)
    noise, views = random.normal(4, 4, 2, 2), (random.uniform(4) >= 0.5).long()
    assert len(views.unique()) == 2
    batch = latents.batch(rows, KeyedNoise(0, "test", 0))
    for place, (view, row) in enumerate(zip(views, rows)):
        torch.testing.assert_close(batch.latents[place], mean[view, row] + std[view, row] * noise[place])
        assert torch.equal(batch.geometry[place], geometry[view, row])
        assert torch.equal(batch.features[place], features[view, row]) and torch.equal(batch.mask[place], masks[row])
    assert batch.captions == ["c", "a", "c", "b"] and torch.equal(batch.posterior_input, batch.features)
    unflipped = ContextLatents(mean[:1], std[:1], masks, ["obs"] * 3, list("abc"), geometry[:1])
    batch = unflipped.batch(rows, KeyedNoise(0, "test", 0))
    torch.testing.assert_close(batch.latents, mean[0, rows] + std[0, rows] * noise)
    assert batch.features is None and batch.posterior_input is batch.latents


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_the_global_batches_and_may_begin_anywhere(num_processes):
    n, batch_size = 7, 2
    numbered = torch.arange(n, dtype=torch.float32).view(1, n, 1, 1, 1)
    contexts = ["obs"] * 4 + ["night"] * 3
    latents = ContextLatents(
        numbered, torch.zeros_like(numbered), torch.zeros(n, 1), contexts, [""] * n, torch.zeros(1, n, 6)
    )

    def rows(size: int, index: int, count: int, start: int = 0) -> list[list[int]]:
        batches = LatentBatches(latents, size, 5, index, count).batches(start)
        return [next(batches)[0].latents.flatten().int().tolist() for _ in range(6)]

    whole = rows(batch_size * num_processes, 0, 1)
    shares = [rows(batch_size, index, num_processes) for index in range(num_processes)]
    assert whole == [[row for part in parts for row in part] for parts in zip(*shares)]
    assert rows(batch_size, 0, num_processes, start=4)[:2] == shares[0][4:]
    assert all(sorted(contexts[row] for row in batch).count("obs") == len(batch) // 2 for batch in whole)


# random numbers


def draws(noise: KeyedNoise, batch_size: int) -> list[torch.Tensor]:
    return [noise.normal(batch_size, 3, 2), noise.uniform(batch_size), noise.normal(batch_size)]


def test_the_shares_of_processes_make_up_what_one_process_draws():
    whole = draws(KeyedNoise(5, "a", 7), 8)
    for count in (2, 4):
        parts = [KeyedNoise(5, "a", 7, process_index=index, num_processes=count) for index in range(count)]
        shares = [draws(part, 8 // count) for part in parts]
        for one, several in zip(whole, zip(*shares)):
            assert torch.equal(torch.cat(several), one)


def test_numbers_depend_on_seed_stream_and_step_and_on_nothing_else():
    first = draws(KeyedNoise(5, "a", 7), 8)
    torch.randn(100)
    draws(KeyedNoise(5, "a", 6), 3)
    assert all(map(torch.equal, draws(KeyedNoise(5, "a", 7), 8), first))
    for other in (KeyedNoise(5, "a", 8), KeyedNoise(6, "a", 7), KeyedNoise(5, "b", 7), KeyedNoise(5, "a7")):
        assert not any(map(torch.equal, draws(other, 8), first))
    assert not torch.equal(first[0][:, 0, 0], first[2])


def test_numbers_have_the_laws_that_they_are_named_after():
    noise = KeyedNoise(0, "a", 0)
    normal, uniform = noise.normal(20_000), noise.uniform(20_000)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize(
    ("sampling", "distribution"),
    [
        ("uniform", lambda x: x),
        ("logit_normal", lambda x: norm.cdf(np.log(x / (1 - x)))),
        ("high_noise", lambda x: x**2),
    ],
)
def test_timesteps_follow_their_law(sampling, distribution):
    timesteps = sample_timesteps(KeyedNoise(0, "a", 0).uniform(50_000), sampling, 1000)
    assert timesteps.dtype == torch.int64 and 0 <= timesteps.min() and timesteps.max() <= 999
    for place in (0.1, 0.3, 0.5, 0.8, 0.95):
        assert abs((timesteps < 1000 * place).double().mean() - distribution(place)) < 0.01


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "high_noise"])
def test_the_ends_of_the_range_are_timesteps(sampling):
    ends = sample_timesteps(torch.tensor([0.0, 1 - 2**-24]), sampling, 1000)
    assert 0 <= ends[0] <= ends[1] <= 999
