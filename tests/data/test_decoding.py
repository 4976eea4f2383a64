"""Pictures of all kinds as RGB, and why some cannot be decoded."""

import io
import pickle
import struct
import warnings
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusers_ctx.autoencoding import to_pixels
from diffusers_ctx.data import load_context_dataset
from diffusers_ctx.data.decoding import conversions, square_crop, to_rgb
from diffusers_ctx.data.encoded_images import read_image
from diffusers_ctx.data.streaming import ContextStream, open_stream, take_images
from diffusers_ctx.training.encoding.images import ImageTransform


LEVELS = np.arange(0, 256, 17, dtype=np.uint8)
RAMP = LEVELS[None].repeat(16, 0)  # grey, from black to white
COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
DEEP = RAMP.astype(np.int64) * 257  # the same in 16 bits


def encoded(image: Image.Image, kind: str, **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def png(depth: int, color: int, pixels: np.ndarray, *chunks: tuple[bytes, bytes], claimed=None) -> dict:
    """A PNG file of pixels (H, W, C), as Pillow does not write all of them; its header may claim another size."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2" if depth == 16 else "u1"))
    height, width = claimed or pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return {"bytes": file, "path": None}


def red_square(ground: tuple[int, int, int]) -> Image.Image:
    """A red square on nothing; the ground's color is hidden."""
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., :3] = ground
    pixels[4:12, 4:12] = (200, 0, 0, 255)
    return Image.fromarray(pixels)


SEEN = np.full((16, 16, 3), 255, np.uint8)
SEEN[4:12, 4:12] = (200, 0, 0)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (DEEP.astype(np.uint16), "PNG"),
        (DEEP.astype(np.uint16), "TIFF"),
        (DEEP.astype(np.uint16), "PPM"),
        (DEEP.astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        ((DEEP << 15).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32) / 255, "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        (DEEP.astype(np.float32), "TIFF"),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_levels(values, kind):
    image, found = read_image(encoded(Image.fromarray(values), kind))
    assert image.mode == "RGB" and (np.asarray(image) == RAMP[..., None]).all()
    assert bool(found) == (values.dtype != np.uint16)  # how large 32 bits are is a guess, and is said


def test_colors_of_16_bits_and_a_transparent_grey_of_16_bits():
    image, _ = read_image(png(16, 2, COLORS.astype(np.int64) * 257))
    assert (np.asarray(image) == COLORS).all()
    image, (found,) = read_image(png(16, 0, DEEP[..., None], (b"tRNS", struct.pack(">H", 257 * 34))))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 17, 255, *LEVELS[3:].tolist()] and "transparent" in found


@pytest.mark.parametrize("values", [[-5.0, 1.0], [0.0, 1e9], [0.0, np.nan]])
def test_values_in_no_usual_range_are_refused(values):
    with pytest.raises(ValueError, match="in no usual range; save it with 8 or 16 bits"):
        read_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
def test_other_color_spaces(mode):
    image = Image.fromarray(COLORS)
    if mode == "LAB":
        profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - COLORS).mean() < 2 and conversions(image) == []


def test_black_and_white():
    assert np.unique(np.asarray(to_rgb(Image.fromarray(RAMP).convert("1")))).tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_what_transparency_hides_is_not_seen(mode):
    for ground in ((0, 0, 0), (0, 255, 0), (255, 255, 255)):
        image = red_square(ground)
        steps = {"RGBa": ["RGBa"], "LA": ["LA"], "La": ["LA", "La"]}.get(mode, [])
        for step in steps:
            image = image.convert(step)
        if mode == "PA":
            alpha, image = image.getchannel("A"), image.convert("RGB").quantize().convert("PA")
            image.putalpha(alpha)
        seen = np.asarray(Image.fromarray(SEEN).convert("L").convert("RGB")) if mode in ("LA", "La") else SEEN
        assert image.mode == mode and (np.asarray(to_rgb(image)) == seen).all()
        assert conversions(image) == ["with transparent parts (laid over white)"]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_color(mode):
    image = Image.fromarray(RAMP).convert(mode)
    image, (found,) = read_image(encoded(image, "PNG", transparency=image.getpixel((2, 0))))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 17, 255, *LEVELS[3:].tolist()] and "transparent" in found


def test_an_alpha_channel_that_hides_nothing_is_not_said():
    image, found = read_image(encoded(Image.fromarray(COLORS).convert("RGBA"), "PNG"))
    assert (np.asarray(image) == COLORS).all() and found == []


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken_and_that_is_said(kind):
    first, second = Image.fromarray(COLORS), Image.fromarray(COLORS[::-1])
    options = {"lossless": True} if kind == "WEBP" else {}
    image, found = read_image(encoded(first, kind, save_all=True, append_images=[second], **options))
    assert (np.asarray(image) == COLORS).all() and found == ["with several frames (the first is taken)"]


def test_the_second_picture_of_a_phone_is_no_frame():
    photo, preview = Image.fromarray(COLORS), Image.fromarray(RAMP)
    _, found = read_image(encoded(photo, "MPO", save_all=True, append_images=[preview]))
    assert found == []


@pytest.mark.parametrize("pixels", [COLORS, DEEP.astype(np.uint16)], ids=["RGB", "I;16"])
def test_pictures_stand_upright(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    image, _ = read_image(encoded(Image.fromarray(pixels), "PNG", exif=exif))
    upright, _ = read_image(encoded(Image.fromarray(pixels), "PNG"))
    assert (np.asarray(image) == np.rot90(np.asarray(upright), -1)).all()
    assert (np.asarray(to_rgb(image)) == np.asarray(image)).all()  # and are not turned twice


def test_damaged_exif_data_do_not_spoil_a_picture():
    image, _ = read_image(encoded(Image.fromarray(COLORS), "PNG", exif=b"Exif\0\0garbage!!"))
    assert (np.asarray(image) == COLORS).all()


LONG = zlib.compress(b"x" * 3_000_000)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"workflow\0\0" + LONG)],
        [(b"iTXt", b"workflow\0\1\0\0\0" + LONG)],
        [(b"iCCP", b"profile\0\0" + LONG)],
        [(b"tEXt", b"workflow\0" + b"x" * 1_000_000)] * 70,
    ],
    ids=["compressed", "international", "profile", "many"],
)
def test_long_metadata_do_not_spoil_a_png(chunks):
    image, found = read_image(png(8, 2, COLORS, *chunks))
    assert (np.asarray(image) == COLORS).all() and found == []


JPEG = encoded(Image.fromarray(COLORS).resize((200, 200)), "JPEG")["bytes"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "the file is empty"),
        (b"\0" * 99, "zeros alone"),
        (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        (
            b"\0\0\0\x18ftypheic" + b"x" * 99,
            "HEIC under another name; convert it to JPEG, or `pip install pillow-heif`",
        ),
        (b"\0\0\0\x18ftypqt  " + b"x" * 99, "a video under another name"),
        (b"<!DOCTYPE html><html>", "a web page under another name"),
        (b"<?xml version='1.0'?><svg/>", "SVG; convert it to PNG"),
        (b"II*\0\x08\0\0\0", "a kind of TIFF that Pillow cannot read"),
        (b"no image", "cannot identify image file"),
        (JPEG[:-200], "truncated"),
        (png(8, 0, np.zeros((1, 1, 1)), claimed=(30_000, 30_000))["bytes"], "scale it down"),
    ],
)
def test_why_an_image_cannot_be_read(content, cause):
    with pytest.raises(ValueError, match=cause):
        read_image({"bytes": content, "path": None})


# every place that makes RGB


@pytest.fixture
def folder(tmp_path):
    """Two contexts; `night` has a picture of 16 bits, `obs` three that hide another color each."""
    for context in ("obs", "night"):
        (tmp_path / "photos" / context).mkdir(parents=True)
    for index, ground in enumerate(((0, 0, 0), (0, 255, 0), (255, 255, 255))):
        red_square(ground).save(tmp_path / "photos" / "obs" / f"{index}.png")
    Image.fromarray(DEEP.astype(np.uint16)).save(tmp_path / "photos" / "night" / "0.png")
    return tmp_path / "photos"


def check_rows(rows):
    for row in rows:
        expected = SEEN if row["context"] == "obs" else RAMP[..., None].repeat(3, 2)
        assert row["image"].mode == "RGB" and (np.asarray(row["image"]) == expected).all()


CONVERTED = r"^Images are converted to RGB: 3 with transparent parts \(laid over white\)\.$"


def test_folders_columns_and_streams_make_the_same_rgb(folder, tmp_path, caplog):
    with pytest.warns(UserWarning, match=CONVERTED) as said:
        loaded = load_context_dataset(folder)
    check_rows(loaded)
    assert len(said) == 1

    files = {name: [str(file) for file in sorted((folder / name).iterdir())] for name in ("night", "obs")}
    columns = {"image": files["night"] + files["obs"], "context": ["night"] + ["obs"] * 3}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.warns(UserWarning, match=CONVERTED):
        check_rows(load_context_dataset(table))
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    for source in (folder, tmp_path / "hub"):
        with pytest.warns(UserWarning, match=CONVERTED):
            check_rows(take_images(open_stream(source), 3, concepts=["night"], show_progress=False))
        stream = open_stream(source)
        shown = [next(ContextStream(stream, "obs", 4))[0] for _ in range(3)]
        assert all((np.asarray(image) == SEEN).all() for image in shown)
    assert [record.message for record in caplog.records] == [
        "Images of the stream are converted to RGB: some with transparent parts (laid over white)."
    ] * 2


def test_workers_that_load_a_dataset_make_the_same_rgb(folder):
    with pytest.warns(UserWarning, match=CONVERTED):
        loaded = load_context_dataset(folder)
    check_rows(pickle.loads(pickle.dumps(loaded.select(range(len(loaded))))))


def test_crops_training_and_counterfactuals_make_the_same_rgb(plain_pipeline):
    deep, clear = Image.fromarray(DEEP.astype(np.uint16)), red_square((0, 255, 0))
    transform = ImageTransform(16, center_crop=True, seed=0)
    with pytest.warns(UserWarning, match=r"1 with transparent parts \(laid over white\)"):
        pixels = to_pixels([deep, clear], plain_pipeline.image_processor, 16)
    for image, seen, tensor in zip((deep, clear), (RAMP[..., None].repeat(3, 2), SEEN), pixels):
        assert (np.asarray(square_crop(image, 16)) == seen).all()
        for made in (transform(image, 0), tensor):
            np.testing.assert_allclose((made.permute(1, 2, 0) + 1) * 127.5, seen, atol=1e-3)


def test_plain_pictures_are_not_spoken_of(folder):
    for file in (folder / "obs").iterdir():
        Image.fromarray(COLORS).save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_context_dataset(folder)
