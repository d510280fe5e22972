# SPDX-License-Identifier: BSD-3-Clause
"""From a file's bytes to pixels: the pixels are torchvision's, whatever the kind of file and the decoder."""

import io

from engine.data import transforms
from engine.data.transforms import Augmentation, Preprocessing

from helpers.decoded import PHOTO, generator
from helpers.images import jpeg, photo

import numpy as np
import pytest
from PIL import Image

# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "size, tolerance", [((500, 375), 0.3), ((2000, 1500), 1.5)], ids=["full size", "scaled decode"]
)
def test_training_crops_are_torchvisions_for_the_same_box(size, tolerance):
    """By the mean difference in grey levels of 255."""
    content = jpeg(size[0], size[1], 3, quality=92)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    for seed in range(20):
        rng = generator(seed)
        box = transforms.random_crop_box(size[0], size[1], Augmentation.CROP_SCALE, rng)
        expected = np.asarray(whole.crop(box).resize((224, 224), Image.BILINEAR), int)
        if rng.random_sample() < 0.5:
            expected = expected[:, ::-1]
        pixels = Augmentation(224)(content, generator(seed))
        assert pixels.dtype == np.uint8 and abs(pixels.astype(int) - expected).mean() <= tolerance


def test_crop_boxes_have_torchvisions_distribution():
    rng = generator(0)
    boxes = np.array([transforms.random_crop_box(500, 375, Augmentation.CROP_SCALE, rng) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    area = width * height / (500 * 375)
    assert 0.079 < area.min() < 0.09 and 0.9 < area.max() <= 1
    assert (width / height).min() > 0.74 and (width / height).max() < 1.345


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000)], ids=str)
def test_an_image_too_narrow_for_a_crop_gives_the_largest_central_one(size):
    box = transforms.random_crop_box(size[0], size[1], Augmentation.CROP_SCALE, generator(0))
    width, height = box[2] - box[0], box[3] - box[1]
    assert (width, height) == ((13, 10) if size == (1000, 10) else (10, 13))
    assert abs(box[0] + box[2] - size[0]) <= 1 and abs(box[1] + box[3] - size[1]) <= 1


@pytest.mark.parametrize(
    "mode, kind", [("CMYK", "JPEG"), ("L", "JPEG"), ("RGB", "progressive"), ("RGBA", "PNG"), ("RGB", "PNG")]
)
def test_pillow_reads_what_simplejpeg_cannot(monkeypatch, mode, kind):
    """And simplejpeg gives Pillow's pixels for the rest, but for the rounding of a scaled decode."""
    pytest.importorskip("simplejpeg")
    content = io.BytesIO()
    options = {"format": "JPEG", "progressive": True} if kind == "progressive" else {"format": kind}
    Image.fromarray(photo(300, 200, 3)).convert(mode).save(content, **options)

    def crops():
        return [Augmentation(64)(content.getvalue(), generator(seed)).astype(int) for seed in range(5)]

    with_simplejpeg = crops()
    monkeypatch.setattr(transforms, "simplejpeg", None)
    assert max(abs(one - other).mean() for one, other in zip(with_simplejpeg, crops())) <= 1.5


def test_a_small_image_is_padded_cropped_and_mirrored():
    """With any offset of up to 4 pixels, half of the time mirrored, and never if `flip` is off."""
    image = photo(32, 32, 7)
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    expected = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32]
            expected[crop.tobytes()], expected[crop[:, ::-1].tobytes()] = (top, left, False), (top, left, True)
    rng = generator(1)
    drawn = [expected[transforms.random_padded_crop(image, 32, 0.5, rng).tobytes()] for _ in range(2000)]
    assert len(set(drawn)) == 2 * 81
    assert 900 < sum(mirrored for _, _, mirrored in drawn) < 1100
    for _ in range(50):
        assert not expected[transforms.random_padded_crop(image, 32, 0, rng).tobytes()][2]
    assert transforms.random_padded_crop(image, 48, 0.5, rng).shape == (48, 48, 3)


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [224, 64])
def test_validation_pixels_are_torchvisions_bit_for_bit(size):
    torchvision = pytest.importorskip("torchvision.transforms")
    theirs = torchvision.Compose([torchvision.Resize(round(size * 256 / 224)), torchvision.CenterCrop(size)])
    shapes = [(500, 375), (375, 500), (256, 256), (301, 257), (120, 90), (90, 700), (224, 257)]
    for number, (width, height) in enumerate(shapes):
        content = jpeg(width, height, number, quality=92)
        expected = np.asarray(theirs(Image.open(io.BytesIO(content)).convert("RGB")))
        assert np.array_equal(Preprocessing(size)(content), expected), (width, height)


def test_a_whole_image_has_the_short_side_that_is_asked_for():
    assert transforms.whole_image(jpeg(60, 30, 1), 48).shape == (48, 96, 3)
    assert transforms.whole_image(PHOTO, 15).shape == (15, 20, 3)
    assert Preprocessing(224).short_side == 256 and Preprocessing(224, crop=False).short_side == 224


def test_what_a_checkpoint_does_not_say_of_preprocessing_is_imagenets():
    digits = Preprocessing(48, False, (0.5,) * 3, (0.25,) * 3)
    assert digits.to_dict() == {"image_size": 48, "crop": False, "mean": [0.5] * 3, "std": [0.25] * 3}
    assert Preprocessing.from_dict(digits.to_dict()) == digits
    assert Preprocessing.from_dict({"image_size": 32, "other": 1}) == Preprocessing(32) and Preprocessing(32).crop
