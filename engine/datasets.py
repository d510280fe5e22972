# SPDX-License-Identifier: BSD-3-Clause
"""The datasets: a folder of images, CIFAR-10, and the embedded digits.

Each gives single images: `training_image(index, size, rng)` and `validation_image(index, size)`, both
(size, size, 3) uint8. loader.py makes batches of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import IO, Any, Iterator, Sequence, Union

from engine.errors import DataError, ImageError, UsageError
from engine.folder_index import Check, open_index
from engine.safe_pickle import load_arrays
from engine.transforms import (
    BILINEAR,
    printable,
    random_padded_crop,
    random_resized_crop,
    read_rgb,
    reason_of,
    resize,
    resize_center_crop,
)

import numpy as np
from PIL import Image

DATA_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data")
EMBEDDED = "the embedded digits"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3760,) * 3  # of all 1,797 digits at 8×8


class ImageFolder:
    """ROOT/class/**/image, read as torchvision's ImageFolder reads it: the same classes, files and order.

    check: None, or what leaves unreadable images out; see folder_index.open_index.
    Raises DataError if the folder is missing or has no classes, or if a class is empty.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    default_size = 224
    center_crop = True  # validation resizes and crops the center; otherwise it resizes the whole image

    def __init__(self, root: str, check: Check | None = None) -> None:
        self.index = open_index(root, check)
        self.classes, self.labels, self.fingerprint = self.index.classes, self.index.labels, self.index.fingerprint
        self.unreadable = [(printable(os.path.join(root, name)), reason) for name, reason in self.index.unreadable]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return self.index.path(index)

    def training_image(self, index: int, size: int, rng: np.random.RandomState) -> np.ndarray:
        with self._named_errors(index) as path:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            return random_resized_crop(content, size, rng)

    def validation_image(self, index: int, size: int) -> np.ndarray:
        with self._named_errors(index) as path:
            return resize_center_crop(read_rgb(path), size)

    @contextlib.contextmanager
    def _named_errors(self, index: int) -> Iterator[str]:
        """Yield the path of an image, and turn whatever its reader raises into an ImageError that names it."""
        path = self.path(index)
        try:
            yield path
        except Exception as error:  # Pillow raises nearly any type for a corrupt file
            raise ImageError(
                f"{printable(path)}: cannot be read as an image ({reason_of(error)}); --bad-images skip leaves such "
                "files out"
            ) from error


class ArrayDataset:
    """Small images held in memory.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: N integers.
        flip: whether to mirror half of the training images.
    """

    default_size = 32
    center_crop = False
    unreadable: Sequence[tuple[str, str]] = ()

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        flip: bool,
    ) -> None:
        self.images, self.labels, self.classes = images, np.asarray(labels, np.int64), list(classes)
        self.mean, self.std, self.flip = mean, std, flip
        self.fingerprint = hashlib.sha256(images.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def training_image(self, index: int, size: int, rng: np.random.RandomState) -> np.ndarray:
        return random_padded_crop(self.images[index], size, self.flip, rng)

    def validation_image(self, index: int, size: int) -> np.ndarray:
        return resize(self.images[index], size)


ImageDataset = Union[ImageFolder, ArrayDataset]


def preprocessing_of(dataset: ImageDataset | type[ImageFolder], size: int) -> dict[str, Any]:
    """Return how validation images become the model's input, as checkpoints hold it."""
    return {"image_size": size, "crop": dataset.center_crop, "mean": list(dataset.mean), "std": list(dataset.std)}


def open_datasets(
    root: str | None, *, evaluate: bool, check: Check | None
) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Return (training, validation) datasets below a folder, or the embedded digits; no training dataset to evaluate.

    check: leaves unreadable images of a folder out. Raises DataError, or UsageError if the classes of the two differ.
    """
    if root is None:
        return None if evaluate else read_digits(training=True), read_digits(training=False)
    if find_cifar10(root):
        return None if evaluate else read_cifar10(root, training=True), read_cifar10(root, training=False)
    training = None if evaluate else ImageFolder(os.path.join(root, "train"), check)
    validation = ImageFolder(os.path.join(root, "val"), check)
    if training is not None:
        check_same_classes(training.classes, validation.classes, "train/", "val/")
    return training, validation


def check_same_classes(first: Sequence[str], second: Sequence[str], first_name: str, second_name: str) -> None:
    """Raise UsageError, naming the first difference, if two lists of class names differ."""
    for position in range(max(len(first), len(second))):
        a, b = (names[position] if position < len(names) else None for names in (first, second))
        if a != b:
            a, b = (repr(name) if name is not None else "missing" for name in (a, b))
            raise UsageError(f"the classes differ: number {position} is {a} in {first_name} and {b} in {second_name}")


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def find_cifar10(root: str) -> tuple[str, bool] | None:
    """Return (folder, whether it is the binary version) if `root` holds CIFAR-10, itself or as unpacked; else None."""
    for folder in (root, os.path.join(root, "cifar-10-batches-py"), os.path.join(root, "cifar-10-batches-bin")):
        for name, binary in (("test_batch", False), ("test_batch.bin", True)):
            if os.path.isfile(os.path.join(folder, name)):
                return folder, binary
    return None


def read_cifar10(root: str, *, training: bool) -> ArrayDataset:
    """Read CIFAR-10 from its own files (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

    Raises DataError if a file is missing or has another format.
    """
    found = find_cifar10(root)
    if found is None:
        raise DataError(f"{printable(root)}: no CIFAR-10 in it")
    folder, binary = found
    images, labels = [], []
    for name in [f"data_batch_{number}" for number in range(1, 6)] if training else ["test_batch"]:
        path = os.path.join(folder, f"{name}.bin" if binary else name)
        try:
            with open(path, "rb") as file:
                pixels, numbers = _read_cifar10_binary(file) if binary else _read_cifar10_pickle(file)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error
        except Exception as error:  # a corrupt pickle raises nearly any type
            raise DataError(f"{path}: not a CIFAR-10 file ({error})") from error
        images.append(pixels)
        labels.append(numbers)
    planes = np.concatenate(images).reshape(-1, 3, 32, 32)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return ArrayDataset(pixels, np.concatenate(labels), CIFAR10_CLASSES, mean=CIFAR10_MEAN, std=CIFAR10_STD, flip=True)


def _read_cifar10_binary(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(file.read(), np.uint8).reshape(-1, 1 + 3072)
    return _checked_cifar10(records[:, 1:], records[:, 0])


def _read_cifar10_pickle(file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    record = load_arrays(file)
    return _checked_cifar10(record[b"data"], np.asarray(record[b"labels"]))


def _checked_cifar10(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(labels) or pixels.shape != (len(labels), 3072) or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"images {pixels.shape}, labels {labels.shape}")
    return pixels, labels


# --- the embedded digits ----------------------------------------------------------------------------------------------


def read_digits(*, training: bool) -> ArrayDataset:
    """Read the 1,797 embedded handwritten digits (data/README.md). Every fifth is for validation."""
    sheet = np.asarray(Image.open(os.path.join(DATA_FOLDER, "digits.png")))  # cells of 8×8, 60 per row
    with open(os.path.join(DATA_FOLDER, "digits.txt")) as file:
        labels = np.array([int(digit) for digit in "".join(file.read().split())])
    cells = sheet.reshape(sheet.shape[0] // 8, 8, 60, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)[: len(labels)]
    chosen = (np.arange(len(labels)) % 5 == 4) != training
    images = [np.asarray(Image.fromarray(cell).convert("RGB").resize((32, 32), BILINEAR)) for cell in cells[chosen]]
    return ArrayDataset(np.stack(images), labels[chosen], "0123456789", mean=DIGITS_MEAN, std=DIGITS_STD, flip=False)
