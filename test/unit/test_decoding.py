# SPDX-License-Identifier: BSD-3-Clause
"""Reading files: every kind of image is RGB, and what cannot be read is refused before it takes memory."""

import io
import mmap
import struct
import zlib

from engine.data import decoding, transforms
from engine.data.datasets import FileList
from engine.data.loader import ImageBatches
from engine.data.transforms import Augmentation, Preprocessing

from helpers.decoded import PHOTO, assert_names_the_file, generator, read_rgb
from helpers.images import jpeg, photo

import numpy as np
import pytest
from PIL import Image

# --- files of every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, name",
    [
        ("L", "x.png"),
        ("P", "x.png"),
        ("RGBA", "x.png"),
        ("LA", "x.png"),
        ("CMYK", "x.jpg"),
        ("1", "x.png"),
        ("RGB", "x.webp"),
    ],
)
def test_every_kind_of_image_is_read_as_rgb(tmp_path, mode, name):
    path = str(tmp_path / name)
    Image.fromarray(PHOTO).convert(mode).save(path)
    pixels = np.asarray(read_rgb(path))
    assert pixels.shape == (30, 40, 3)
    if mode in ("RGBA", "RGB", "P"):
        assert abs(pixels.astype(int) - PHOTO).mean() < 30


def test_a_16_bit_image_keeps_its_upper_bytes(tmp_path):
    grey = PHOTO[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 256 + 17).save(str(tmp_path / "x.png"))
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png"))[..., 1], grey)


RAMP = np.tile(np.linspace(0, 1, 256), (32, 1))
FORMATS = ["png", "tif", "pgm"]


def write_deep(path, pixels, name):
    """Write 16-bit pixels."""
    if name == "pgm":
        content = b"P5 %d %d 65535\n" % pixels.shape[::-1] + pixels.astype(">u2").tobytes()
        with open(path, "wb") as file:
            file.write(content)
    else:
        Image.fromarray(pixels.astype(np.uint16)).save(path)


def every_way(path):
    """The pixels of a file in training, in validation at two sizes, and as a whole image."""
    content = decoding.read_file(path)
    yield Augmentation(64)(content, generator(0))
    for size in (32, 64):
        yield Preprocessing(size)(content)
    yield Preprocessing(32, crop=False)(content)
    yield transforms.whole_image(content, 48)


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(decoding, "_warned_of_dark", bytearray(1))


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("name", FORMATS)
def test_a_16_bit_ramp_has_the_mean_of_an_8_bit_ramp(tmp_path, capsys, name):
    path = str(tmp_path / f"x.{name}")
    write_deep(path, RAMP * 65535, name)
    assert np.asarray(read_rgb(path)).mean() == pytest.approx(127.5, abs=0.6)
    list(every_way(path))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("unwarned")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("top", [0, 1, 255, 1023, 4095, 4096, 16383])
def test_16_bit_values_below_4096_are_said_once(tmp_path, capsys, top, name):
    paths = [str(tmp_path / f"{number}.{name}") for number in range(3)]
    for path in paths:
        write_deep(path, (RAMP * top).round(), name)
    for path in paths:
        list(every_way(path))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (top < 4096) and all(paths[0] in line and "4096" in line for line in lines)


@pytest.mark.usefixtures("unwarned")
def test_workers_say_once_that_16_bit_images_are_dark(tmp_path, capfd):
    from engine.data.workers import worker_options

    from torch.utils.data import DataLoader

    paths = [str(tmp_path / f"{number}.png") for number in range(40)]
    for path in paths:
        write_deep(path, (RAMP * 4095).round(), "png")
    decoding._warned_of_dark = mmap.mmap(-1, 1)
    requests = [(0, part) for part in np.split(np.arange(40), 20)]
    batches = ImageBatches(FileList(paths), Preprocessing(32))
    assert len(list(DataLoader(batches, batch_size=None, sampler=requests, **worker_options(4)))) == 20
    assert 1 <= capfd.readouterr().err.count("4096") <= 2  # two of them may find out at the same moment


@pytest.mark.parametrize(
    "dtype, mode",
    [(np.int32, "I"), (np.float32, "F"), (np.float32, "F"), (np.int32, "I")],
    ids=["int32", "float", "unit", "small"],
)
def test_32_bit_pixels_are_refused_everywhere(tmp_path, dtype, mode):
    path = tmp_path / "x.tif"
    for top in (1, 255, 65535):
        Image.fromarray((RAMP * top).astype(dtype), mode=mode).save(str(path))
        assert_names_the_file(path, "x.tif.*convert it to 8 bits")


def test_a_png_named_jpeg_is_read(tmp_path):
    path = tmp_path / "x.JPEG"
    Image.fromarray(PHOTO).save(str(path), format="PNG")
    assert np.array_equal(np.asarray(read_rgb(path)), PHOTO)
    assert Augmentation(16)(path.read_bytes(), generator(0)).shape == (16, 16, 3)


def test_exif_rotation_is_ignored_as_torchvision_ignores_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(str(tmp_path / "x.jpg"), exif=exif)
    assert read_rgb(tmp_path / "x.jpg").size == (40, 30)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_with_exif_rotate_images_are_upright_in_every_way(orientation, kind):
    from PIL import ImageOps

    exif, content = Image.Exif(), io.BytesIO()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(photo(90, 60, 2)).save(content, kind, exif=exif.tobytes())
    stored = content.getvalue()
    if orientation is not None and Image.open(io.BytesIO(stored)).getexif().get(0x0112) != orientation:
        pytest.skip("this Pillow keeps no EXIF data there")
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    upright = np.asarray((turned or Image.open(io.BytesIO(stored))).convert("RGB"))
    same = orientation in (None, 0, 1, 9)
    for crop in (True, False):
        plain, rotated = (Preprocessing(48, crop, exif_rotate=rotate)(stored) for rotate in (False, True))
        assert np.array_equal(rotated, Preprocessing(48, crop)(upright)) and np.array_equal(rotated, plain) == same
    whole = transforms.whole_image(stored, 48, exif_rotate=True)
    assert np.array_equal(whole, transforms.whole_image(upright, 48))
    assert np.array_equal(whole, transforms.whole_image(stored, 48)) == same
    for seed in range(5):
        pixels = Augmentation(32, exif_rotate=True)(stored, generator(seed)).astype(int)
        if same:
            assert np.array_equal(pixels, Augmentation(32)(stored, generator(seed)))
        else:
            rng = generator(seed)
            box = transforms.random_crop_box(upright.shape[1], upright.shape[0], Augmentation.CROP_SCALE, rng)
            expected = transforms._pillow_resize_crop(upright, box, 32, rng.random_sample() < 0.5)
            assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once_in_every_way_because_pillow_turns_it(orientation, rotate, compression):
    image, content = Image.fromarray(photo(90, 60, 2)), io.BytesIO()
    image.save(content, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    stored, turn = content.getvalue(), decoding.TRANSPOSITIONS.get(orientation)
    upright = image if turn is None else image.transpose(turn)
    assert np.array_equal(Preprocessing(48, exif_rotate=rotate)(stored), Preprocessing(48)(np.asarray(upright)))
    assert np.array_equal(transforms.whole_image(stored, 48, rotate), transforms.whole_image(np.asarray(upright), 48))
    for options in ({}, {"crop_scale": (1, 1)}, {"train_scale": (48, 60)}):
        for seed in range(5):
            augmentation, rng = Augmentation(48, exif_rotate=rotate, **options), generator(seed)
            if augmentation.train_scale:
                box = transforms.random_scale_box(*upright.size, 48, augmentation.train_scale, rng)
            else:
                box = transforms.random_crop_box(*upright.size, augmentation.crop_scale, rng)
            expected = transforms._pillow_resize_crop(upright, box, 48, rng.random_sample() < 0.5)
            assert np.array_equal(augmentation(stored, generator(seed)), expected)


def test_exif_rotate_is_in_a_checkpoint_only_if_it_is_on():
    for rotate in (False, True):
        values = Preprocessing(64, exif_rotate=rotate).to_dict()
        assert ("exif_rotate" in values) == rotate and Preprocessing.from_dict(values).exif_rotate is rotate


# --- files that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("decoder")
def test_an_image_truncated_anywhere_is_named(tmp_path):
    content = jpeg(300, 200, 3, quality=90)
    path = tmp_path / "x.jpg"
    for percent in range(100):
        path.write_bytes(content[: len(content) * percent // 100])
        assert_names_the_file(path, "x.jpg")


def huge_png():
    """A PNG whose header claims 60000 × 60000 pixels."""
    content = io.BytesIO()
    Image.fromarray(PHOTO).save(content, format="PNG")
    header = bytearray(content.getvalue())
    header[16:24] = struct.pack(">II", 60000, 60000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    return bytes(header)


def huge_jpeg():
    """A JPEG whose header claims 60000 × 60000 pixels."""
    content = jpeg(40, 30, 5)
    frame = content.index(b"\xff\xc0")  # baseline: marker, length, bits, height, width
    return content[: frame + 5] + struct.pack(">HH", 60000, 60000) + content[frame + 9 :]


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("make", [huge_png, huge_jpeg])
def test_a_header_that_claims_gigapixels_is_refused_before_memory_is_allocated(tmp_path, make):
    (tmp_path / "x.jpg").write_bytes(make())
    assert_names_the_file(tmp_path / "x.jpg", "x.jpg: .* pixels")


@pytest.mark.parametrize("size", [(5000, 1), (1, 5000), (20000, 1), (1, 20000), (20000, 7), (60000, 20)], ids=str)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.usefixtures("decoder")
def test_a_thin_image_is_refused_before_it_is_resized(tmp_path, monkeypatch, size, kind):
    path = tmp_path / "x.png"
    Image.new("RGB", size).save(str(path), format=kind)
    monkeypatch.setattr(Image.Image, "resize", None)
    assert_names_the_file(path, "x.png.*too thin: .* pixels")
    with pytest.raises(ValueError, match="too thin"):
        transforms.whole_image(decoding.read_file(str(path)), 512)


def test_an_image_is_resized_to_as_many_pixels_as_may_be_read(monkeypatch):
    content = jpeg(200, 10, 1)
    for limit, works in ((320 * 16, True), (320 * 16 - 1, False)):
        monkeypatch.setattr(transforms, "MAX_PIXELS", limit)
        if works:
            assert transforms.whole_image(content, 16).shape == (16, 320, 3)
        else:
            with pytest.raises(ValueError, match="320 × 16"):
                transforms.whole_image(content, 16)
    monkeypatch.undo()
    assert transforms.whole_image(jpeg(2700, 1, 1), 16).shape == (16, 43200, 3)  # as thin as can be


@pytest.mark.parametrize("megabytes", [1, 3, 20])
@pytest.mark.parametrize("what", ["text", "zTXt", "iTXt", "ICC profile"])
def test_a_png_with_much_text_is_read(tmp_path, what, megabytes):
    from PIL import PngImagePlugin

    text, options = PngImagePlugin.PngInfo(), {}
    if what == "ICC profile":
        options["icc_profile"] = bytes(megabytes * 2**20 + 5)
    elif what == "iTXt":
        text.add_itxt("k", "x" * (megabytes * 2**20 + 5), zip=True)
    else:
        text.add_text("k", "x" * (megabytes * 2**20 + 5), zip=what == "zTXt")
    Image.fromarray(PHOTO).save(str(tmp_path / "x.png"), pnginfo=text, **options)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), PHOTO)


def test_an_image_may_have_as_many_pixels_as_pillow_reads(tmp_path, monkeypatch):
    """And no more, whatever limit a user of Pillow has set."""
    path = str(tmp_path / "x.png")
    Image.fromarray(PHOTO).save(path)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 30)
    assert read_rgb(path).size == (40, 30)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(ValueError, match="its header claims 40 × 30 pixels"):
        read_rgb(path)
