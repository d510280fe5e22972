# SPDX-License-Identifier: BSD-3-Clause
"""What is in a batch. test/run has tests with worker processes."""

import struct

from engine.data import loader, transforms
from engine.data.datasets import FileList, read_digits
from engine.data.loader import ImageBatches
from engine.data.transforms import Augmentation, Preprocessing, whole_image
from engine.data.workers import WholeImages
from engine.errors import ImageError, LoaderWorkerError

from helpers.images import jpeg

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def files(tmp_path):
    """Three files, the second of which is no image."""
    for number, content in enumerate([jpeg(60, 40, 0), b"no image", jpeg(40, 60, 2)]):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    return FileList.find([str(tmp_path)])


@pytest.mark.parametrize("transform", [Augmentation(48), Preprocessing(48)], ids=["training", "validation"])
@pytest.mark.parametrize("scales", [(), (48, 64)], ids=["crops", "whole images"])
def test_an_unreadable_image_is_an_error_in_place_of_the_batch(files, transform, scales):
    error = ImageBatches(files, transform, scales=scales)[0, np.arange(3)]
    assert isinstance(error, ImageError) and "1.jpg: cannot be read as an image" in str(error)


def test_an_unreadable_image_can_be_left_out_of_a_batch(files):
    batches = ImageBatches(files, Preprocessing(48), leave_out=True)
    images, target, indices, errors = batches[0, np.arange(3)]
    assert indices.tolist() == [0, 2] and target.tolist() == [0, 0] and images.shape == (2, 48, 48, 3)
    for image, index in zip(images.numpy(), indices):
        assert np.array_equal(image, Preprocessing(48)(files.read(index)))
    (error,) = errors
    assert "1.jpg" in str(error) and "--bad-images" not in str(error)
    images, _, indices, errors = batches[0, np.array([1])]
    assert images.shape == (0, 48, 48, 3) and indices.shape == (0,) and len(errors) == 1


def test_an_empty_batch_has_the_shapes_of_a_full_one():
    images, target, indices = ImageBatches(read_digits(training=False), Preprocessing(32, crop=False))[0, np.arange(0)]
    assert images.shape == (0, 32, 32, 3) and target.shape == indices.shape == (0,)
    assert (images.dtype, target.dtype, indices.dtype) == (torch.uint8, torch.int64, torch.int64)


def test_whole_images_are_grouped_by_size(files):
    whole, target, indices = ImageBatches(files, Preprocessing(48), scales=(32, 64))[0, np.array([0, 2, 0])]
    groups = whole.by_size()
    assert indices.tolist() == [0, 2, 0] and len(target) == 3 and len(groups) == 4
    for positions, images in groups:
        for position, image in zip(positions.tolist(), images.numpy()):
            assert np.array_equal(image, whole_image(files.read([0, 2, 0][position]), min(image.shape[:2])))


@pytest.mark.parametrize("sizes", [0, 1, 2, 30])
def test_a_batch_has_as_many_tensors_with_many_sizes_as_with_one(tmp_path, sizes):
    """Each tensor takes a file descriptor, and a process has 1,024."""
    for number in range(sizes):
        (tmp_path / f"{number:02d}.jpg").write_bytes(jpeg(40 + 2 * number, 40, number))
    files = FileList.find([str(tmp_path)]) if sizes else FileList([])
    (pixels, layout), target, indices = ImageBatches(files, Preprocessing(48), scales=(32, 48))[0, np.arange(sizes)]
    assert all(isinstance(part, torch.Tensor) for part in (pixels, layout, target, indices))
    assert len(layout) == 2 * sizes and len(WholeImages(pixels, layout).by_size()) == 2 * sizes
    seen = sorted(position for positions, _ in WholeImages(pixels, layout).by_size() for position in positions.tolist())
    assert seen == sorted([*range(sizes)] * 2)


def test_no_descriptor_left_is_not_an_unreadable_image(files, monkeypatch):
    def fail(_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(files, "read", fail)
    for options in ({}, {"leave_out": True}, {"scales": (32,)}):
        error = ImageBatches(files, Preprocessing(32), **options)[0, np.array([0])]
        assert isinstance(error, LoaderWorkerError) and "ulimit -n" in str(error), options


KINDS = [AttributeError, IndexError, KeyError, MemoryError, OSError, RuntimeError, SyntaxError, TypeError, ValueError]
KINDS += [ZeroDivisionError, Image.DecompressionBombError, struct.error]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["random_crop_box", "resize_crop", "_pillow_resize_crop", "shift_colors", "resize"])
def test_a_fault_of_an_augmentation_is_not_an_unreadable_image(files, monkeypatch, kind, step):
    def fail(*_):
        raise kind("a fault")

    monkeypatch.setattr(transforms, step, fail)
    if step == "_pillow_resize_crop":
        monkeypatch.setattr(transforms, "simplejpeg", None)
    transform = Preprocessing(48, crop=False) if step == "resize" else Augmentation(48, color_shift=True)
    if step == "resize_crop" and transforms.simplejpeg is None:
        pytest.skip("requires simplejpeg")
    for leave_out in (False, True):
        with pytest.raises(kind, match="a fault"):
            ImageBatches(files, transform, leave_out=leave_out)[0, np.array([0])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["open", "convert"])
@pytest.mark.parametrize("transform", [Augmentation(48), Preprocessing(48)], ids=["training", "validation"])
def test_any_error_of_decoding_is_an_unreadable_image(files, monkeypatch, kind, step, transform):
    def fail(*_):
        raise kind("broken")

    monkeypatch.setattr(transforms, "simplejpeg", None)
    monkeypatch.setattr(*(Image, "open") if step == "open" else (Image.Image, "convert"), fail)
    error = ImageBatches(files, transform)[0, np.array([2])]
    assert isinstance(error, ImageError) and "2.jpg: cannot be read as an image (" in str(error)
    assert "broken" in str(error)


def test_a_lack_of_shared_memory_is_returned_in_place_of_the_batch(files, monkeypatch):
    def full(_):
        raise LoaderWorkerError("no shared memory is left")

    monkeypatch.setattr(loader, "share", full)
    assert isinstance(ImageBatches(files, Preprocessing(32))[0, np.array([0])], LoaderWorkerError)
