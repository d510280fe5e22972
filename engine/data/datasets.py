# SPDX-License-Identifier: BSD-3-Clause
"""The datasets: a folder of images, CIFAR-10, and the embedded digits.

Each gives single images: `training_image(index, size, rng, augmentation)` and `validation_image(index, size)`, both
(size, size, 3) uint8, and `whole_image(index, scale)`, whose short side is `scale`. loader.py makes batches of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import IO, Any, Iterator, Sequence, Union

from engine.data.augmentation import Augmentation
from engine.data.folder_index import Check, FolderIndex, open_index
from engine.data.images import (
    BILINEAR,
    random_padded_crop,
    random_resized_crop,
    read_rgb,
    reason_of,
    resize,
    resize_center_crop,
    resize_short_side,
)
from engine.errors import DataError, ImageError, UsageError, printable
from engine.safe_pickle import load_arrays

import numpy as np
from PIL import Image

DATA_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "data")
EMBEDDED = "the embedded digits"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of its training images
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS_MEAN, DIGITS_STD = (0.3053,) * 3, (0.3760,) * 3  # of all 1,797 digits at 8×8


class ImageFolder:
    """ROOT/class/**/image, read as torchvision's ImageFolder reads it: the same classes, files and order.

    check: None, or what leaves unreadable images out; see folder_index.open_index.
    index, positions: of the root if it is open already, and of the images in it, if not all.
    Raises DataError if the folder is missing or has no classes, or if a class is empty.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    default_size = 224
    default_hflip = 0.5
    center_crop = True  # validation resizes and crops the center; otherwise it resizes the whole image

    def __init__(
        self,
        root: str,
        check: Check | None = None,
        *,
        index: FolderIndex | None = None,
        positions: np.ndarray | None = None,
    ) -> None:
        self.index = index or open_index(root, check)
        self.classes, self.labels, self.fingerprint = self.index.classes, self.index.labels, self.index.fingerprint
        self.unreadable = [(printable(os.path.join(root, name)), reason) for name, reason in self.index.unreadable]
        self.positions = positions
        if positions is not None:
            self.labels = np.asarray(self.labels)[positions]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return self.index.path(index if self.positions is None else self.positions[index])

    def training_image(
        self, index: int, size: int, rng: np.random.RandomState, augmentation: Augmentation
    ) -> np.ndarray:
        with self._named_errors(index) as path:
            with open(path, "rb", buffering=0) as file:
                content = file.read()
            return random_resized_crop(content, size, rng, augmentation)

    def validation_image(self, index: int, size: int) -> np.ndarray:
        with self._named_errors(index) as path:
            return resize_center_crop(read_rgb(path), size)

    def whole_image(self, index: int, scale: int) -> np.ndarray:
        with self._named_errors(index) as path:
            return np.asarray(resize_short_side(read_rgb(path), scale))

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


def split_by_name(index: FolderIndex, share: float) -> np.ndarray:
    """Return which images are for validation: (N,) bool. Raises DataError if a class has a single image.

    An image is for validation if the SHA-256 of its path below the folder, as a number in [0, 1), is below the share.
    So adding files moves none; but a class without such an image gives the one with the smallest number, and one
    without any other keeps the one with the largest for training.
    """
    labels = np.asarray(index.labels)
    digests = b"".join(hashlib.sha256(index.name(position)).digest()[:8] for position in range(len(labels)))
    numbers = np.frombuffer(digests, ">u8") / 2.0**64
    validation = numbers < share
    for label, name in enumerate(index.classes):
        positions = np.flatnonzero(labels == label)
        if len(positions) < 2:
            raise DataError(f"{printable(name)}: a single image in this class, and --val-split needs two")
        order = positions[np.argsort(numbers[positions])]
        validation[order[0]], validation[order[-1]] = True, False
    return validation


class ArrayDataset:
    """Small images held in memory.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: N integers.
        default_hflip: probability that a training image is mirrored, if --hflip is not given.
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
        default_hflip: float,
    ) -> None:
        self.images, self.labels, self.classes = images, np.asarray(labels, np.int64), list(classes)
        self.mean, self.std, self.default_hflip = mean, std, default_hflip
        self.fingerprint = hashlib.sha256(images.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def training_image(
        self, index: int, size: int, rng: np.random.RandomState, augmentation: Augmentation
    ) -> np.ndarray:
        return random_padded_crop(self.images[index], size, augmentation.hflip, rng)

    def validation_image(self, index: int, size: int) -> np.ndarray:
        return resize(self.images[index], size)

    whole_image = validation_image


ImageDataset = Union[ImageFolder, ArrayDataset]


def preprocessing_of(dataset: ImageDataset | type[ImageFolder], size: int) -> dict[str, Any]:
    """Return how validation images become the model's input, as checkpoints hold it."""
    return {"image_size": size, "crop": dataset.center_crop, "mean": list(dataset.mean), "std": list(dataset.std)}


def is_split(root: str) -> bool:
    """Whether a folder holds training and validation images apart: CIFAR-10, train/ or val/."""
    return find_cifar10(root) is not None or any(os.path.isdir(os.path.join(root, name)) for name in ("train", "val"))


def open_datasets(
    root: str | None, *, evaluate: bool, check: Check | None, val_split: float | None = None
) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Return (training, validation) datasets below a folder, or the embedded digits; no training dataset to evaluate.

    check: leaves unreadable images of a folder out. val_split: the share of a single folder that is for validation.
    Raises DataError, or UsageError if the classes of the two differ or --val-split does not fit.
    """
    if root is None:
        return None if evaluate else read_digits(training=True), read_digits(training=False)
    if val_split is not None:
        return _split_folder(root, val_split, evaluate=evaluate, check=check)
    if find_cifar10(root):
        return None if evaluate else read_cifar10(root, training=True), read_cifar10(root, training=False)
    if not is_split(root):
        raise DataError(
            f"{printable(root)}: no train/ and val/ in it; if its folders are the classes, use --val-split 0.1"
        )
    if not os.path.isdir(os.path.join(root, "val")):
        train = printable(os.path.join(root, "train"))
        raise DataError(f"{printable(root)}: no val/ in it; to split train/, use --data {train} --val-split 0.1")
    training = None if evaluate else ImageFolder(os.path.join(root, "train"), check)
    validation = ImageFolder(os.path.join(root, "val"), check)
    if training is not None:
        check_same_classes(training.classes, validation.classes, "train/", "val/")
    return training, validation


def _split_folder(
    root: str, share: float, *, evaluate: bool, check: Check | None
) -> tuple[ImageDataset | None, ImageDataset | None]:
    if is_split(root):
        raise UsageError(f"--val-split: {printable(root)} is split already (CIFAR-10, train/ or val/): leave it out")
    index = open_index(root, check)
    for_validation = split_by_name(index, share)

    def part(name: str, chosen: np.ndarray) -> ImageFolder:
        dataset = ImageFolder(root, index=index, positions=np.flatnonzero(chosen))
        dataset.fingerprint += f" {name} part, --val-split {share}"
        return dataset

    return None if evaluate else part("training", ~for_validation), part("validation", for_validation)


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
    return ArrayDataset(
        pixels, np.concatenate(labels), CIFAR10_CLASSES, mean=CIFAR10_MEAN, std=CIFAR10_STD, default_hflip=0.5
    )


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
    return ArrayDataset(
        np.stack(images), labels[chosen], "0123456789", mean=DIGITS_MEAN, std=DIGITS_STD, default_hflip=0.0
    )
