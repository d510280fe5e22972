# SPDX-License-Identifier: BSD-3-Clause
"""The datasets: a folder of images, CIFAR, the embedded digits, and files by name.

`read(index)` gives a file's bytes or a small array, which transforms.py makes pixels of; `name(index)` is the file's
path or the image's number.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import unicodedata
from dataclasses import dataclass
from typing import Counter, Sequence, Union

from engine import console
from engine.data.cifar import Cifar, find_cifar, read_cifar
from engine.data.decoding import read_file, reason_of
from engine.data.folder_index import EXTENSIONS, FolderIndex, describe_left_out, open_index, walk
from engine.data.layout import TEST, TRAIN, VAL, advice_of, find_part, open_classes
from engine.data.transforms import BILINEAR, Preprocessing
from engine.errors import DataError, ImageError, UsageError, counted, printable

import numpy as np
from PIL import Image

COMPARED_IMAGES = 20000  # a new list of at most so many is searched for validation images that are training images too
DATA_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "data")
# Mean and standard deviation of all 1,797 digits at 8×8.
DIGITS = Preprocessing(32, crop=False, mean=(0.3053,) * 3, std=(0.3760,) * 3)


class ImageFolder:
    """ROOT/class/**/image, read as torchvision's ImageFolder reads it: the same classes, files and order.

    Or the images of a list file, in its order. part: (training or validation, --val-split, positions of its images) if
    this is a part.
    """

    preprocessing = Preprocessing()
    default_hflip = 0.5
    val_split: float | None = None

    def __init__(self, index: FolderIndex, part: tuple[str, float | None, np.ndarray] | None = None) -> None:
        self.index, self.classes, self.labels, self.fingerprint = index, index.classes, index.labels, index.fingerprint
        self.unreadable = index.unreadable
        self.positions: Sequence[int] | np.ndarray = range(len(self.labels))
        if part is not None:
            name, self.val_split, self.positions = part
            self.labels = self.labels[self.positions]
            self.fingerprint += f" {name} part" + (f", --val-split {self.val_split}" if self.val_split else "")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return self.index.path(self.positions[index])

    def short_name(self, index: int) -> str:
        """Return the path below the folder."""
        return os.fsdecode(self.index.name(self.positions[index]))

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))


class FileList:
    """Files by name, without labels.

    left_out: kinds of other files in the folders that were searched. errors: of what could not be read there.
    """

    def __init__(self, paths: Sequence[str], left_out: Counter[str] | None = None, errors: Sequence[str] = ()) -> None:
        self.paths, self.labels = paths, np.zeros(len(paths), np.int64)
        self.left_out, self.errors = left_out or collections.Counter(), errors

    @staticmethod
    def find(paths: Sequence[str]) -> FileList:
        """Return the files among the paths, and the images in the folders among them, in order. Raises UsageError."""
        found: list[str] = []
        others: Counter[str] = collections.Counter()
        errors: list[str] = []

        def fail(error: OSError) -> None:
            errors.append(f"{printable(os.path.normpath(error.filename))}: cannot be read ({reason_of(error)})")

        for path in paths:
            if not os.path.isdir(path):
                found.append(path)
                continue
            left_out: Counter[str] = collections.Counter()
            before = len(errors)
            groups = walk(os.fsencode(path), b"", left_out, fail)
            images = sorted(os.path.join(path, os.fsdecode(image)) for _, _, group in groups for image in group)
            if not images and len(errors) == before:
                what = f"; {describe_left_out(left_out)}" if left_out else ""
                raise UsageError(f"{path}: no images in it ({' '.join(EXTENSIONS)}{what})")
            found += images
            others.update(left_out)
        if not found:
            raise UsageError(errors[0])
        return FileList(found, others, errors)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return read_file(self.paths[index])


@dataclass
class ArrayDataset:
    """Small images held in memory."""

    images: np.ndarray  # (N, 32, 32, 3) uint8
    labels: np.ndarray
    classes: list[str]
    preprocessing: Preprocessing  # of validation images, unless another --image-size is given
    default_hflip: float  # probability that a training image is mirrored, if --hflip is not given

    val_split, unreadable = None, ()

    def __post_init__(self) -> None:
        self.labels, self.classes = np.asarray(self.labels, np.int64), list(self.classes)
        self.fingerprint = hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return str(index)

    def short_name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> np.ndarray:
        return self.images[index]


ImageDataset = Union[ImageFolder, ArrayDataset]


def image_error(dataset: ImageDataset | FileList, index: int, error: Exception) -> ImageError:
    """Return what to raise for an error of reading an image. It names the file."""
    hint = "; --bad-images skip leaves such files out" if isinstance(dataset, ImageFolder) else ""
    name = printable(dataset.name(index))
    return ImageError(f"{name}: cannot be read as an image ({reason_of(error)})", hint)


def open_datasets(
    root: str | None,
    *,
    evaluate: bool,
    skip_unreadable: bool,
    val_split: float | None = None,
    saved_val_split: float | None = None,
) -> tuple[ImageDataset | None, ImageDataset | None]:
    """Return (training, validation) datasets of a folder or a list file; the embedded digits without one.

    No training dataset to evaluate. skip_unreadable: leaves unreadable images out. val_split: the share of a single
    folder, or of a list without a split, that is for validation; saved_val_split: that of a checkpoint, for what is not
    split already. Without either, an evaluation takes all images of a single folder, or of a list.
    Raises DataError, or UsageError if the classes of the two differ or --val-split does not fit.
    """
    if root is None:
        return None if evaluate else read_digits(training=True), read_digits(training=False)
    share = saved_val_split if val_split is None else val_split
    if os.path.isfile(root):
        training, validation = _open_list(open_index(root, skip_unreadable), root, share, val_split, evaluate)
        log_duplicates(training, validation)
        return training, validation
    name, cifar = printable(root), find_cifar(root)
    train, val, test = (None, None, None) if cifar else (find_part(root, names) for names in (TRAIN, VAL, TEST))
    if val_split is not None and (cifar or train or val):
        raise UsageError(f"--val-split: {name} is split already (CIFAR, train/ or val/): leave it out")
    if cifar:
        training_part = None if evaluate else _open_cifar(*cifar, training=True)
        return training_part, _open_cifar(*cifar, training=False)
    if val is not None:
        if train is None and not evaluate:
            raise DataError(f"{name}: no train/ in it, only {printable(os.path.basename(val))}/")
        training = None if train is None or evaluate else ImageFolder(open_classes(train, skip_unreadable))
        validation = ImageFolder(open_classes(val, skip_unreadable))
        if train is not None and training is not None:
            names = (f"{os.path.basename(path)}/" for path in (train, val))
            check_same_classes(training.classes, validation.classes, *names)
    elif evaluate and (train or (test and share is None)):
        other = printable(test or train or "")
        raise DataError(f"{name}: no val/ in it", f"; to evaluate {other}, use --data {other}")
    elif train is not None:
        rename = f"; to validate on {printable(test)}, rename it to val" if test else ""
        split = f"; to split train/, use --data {printable(train)} --val-split 0.1"
        raise DataError(f"{name}: no val/ in it{rename}", split)
    elif share is not None:
        training, validation = split_by_name(open_classes(root, skip_unreadable), share, evaluate=evaluate)
    elif evaluate:
        training, validation = None, ImageFolder(open_classes(root, skip_unreadable))
    else:
        where, split = advice_of(root)
        raise DataError(f"{name}: no train/ and val/ in it{where}", split)
    log_duplicates(training, validation)
    return training, validation


def _open_list(
    index: FolderIndex, path: str, share: float | None, val_split: float | None, evaluate: bool
) -> tuple[ImageFolder | None, ImageFolder]:
    name, training = printable(path), None
    if len(index.parts) and val_split is not None:
        raise UsageError(f"--val-split: {name} has a column for the split already: leave it out")
    if len(index.parts):
        parts = [np.flatnonzero(index.parts == number) for number in (0, 1)]
        training, validation = (
            ImageFolder(index, (part, None, positions)) for part, positions in zip(("training", "validation"), parts)
        )
    elif share is not None:
        training, validation = split_by_name(index, share, evaluate=evaluate)
    elif evaluate:
        validation = ImageFolder(index)
    else:
        raise DataError(f"{name}: no column for the split: add train or val to each line", ", or use --val-split 0.1")
    if len(index.classes) < 2 or not len(validation):
        raise DataError(f"{name}: expected at least two classes and one image for validation")
    if training is None or evaluate:
        return None, validation
    empty = np.flatnonzero(np.bincount(training.labels, minlength=len(index.classes)) == 0)
    if len(empty):
        raise DataError(f"{name}: no training image of class {printable(index.classes[empty[0]])}")
    return training, validation


def _open_cifar(cifar: Cifar, folder: str, binary: bool, *, training: bool) -> ArrayDataset:
    images, labels, classes = read_cifar(cifar, folder, binary, training=training)
    return ArrayDataset(images, labels, classes, cifar.preprocessing, default_hflip=0.5)


def log_duplicates(training: ImageFolder | None, validation: ImageFolder) -> None:
    """Say if validation images are training images too, byte for byte. Reads only files that are of the same size."""
    if training is None or console.is_quiet() or len(training) + len(validation) > COMPARED_IMAGES:
        return
    if not (training.index.is_new or validation.index.is_new):
        return
    by_size: tuple[dict[int, list[str]], ...] = ({}, {})
    for dataset, sizes in zip((training, validation), by_size):
        for index in range(len(dataset)):
            with contextlib.suppress(OSError):  # it will be named as unreadable
                sizes.setdefault(os.path.getsize(dataset.name(index)), []).append(dataset.name(index))
    pairs = []
    for size in sorted(by_size[0].keys() & by_size[1].keys() - {0}):
        with contextlib.suppress(OSError):
            known = {hashlib.sha256(read_file(path)).digest(): path for path in by_size[0][size]}
            others = [(path, hashlib.sha256(read_file(path)).digest()) for path in by_size[1][size]]
            pairs += [(path, known[digest]) for path, digest in others if digest in known]
    if pairs:
        one, other = (printable(path) for path in min(pairs))
        console.line(
            f"=> warning: {len(pairs):,} of {counted(len(validation), 'validation image')} also in the training set, "
            f"byte for byte, so the accuracy is too high: {one} is {other}; remove one of each"
        )


def split_by_name(index: FolderIndex, share: float, *, evaluate: bool) -> tuple[ImageFolder | None, ImageFolder]:
    """Return (training, validation) parts of a folder. Raises DataError if a class has a single image.

    An image is for validation if the SHA-256 of its path below the folder, as a number in [0, 1), is below the share.
    So adding files moves none; but a class without such an image gives the one with the smallest number, and one
    without any other keeps the one with the largest for training. evaluate: the folder may be none that was trained on,
    so a line says which of its images count.
    """
    whole = "; the images of a folder val/, or with val in a list, are all evaluated" if evaluate else ""
    digests = b"".join(hashlib.sha256(index.name(position)).digest()[:8] for position in range(len(index.labels)))
    numbers = np.frombuffer(digests, ">u8") / 2.0**64
    chosen = numbers < share
    for label, name in enumerate(index.classes):
        positions = np.flatnonzero(index.labels == label)
        if not len(positions):
            hint = " (numbers of classes count from 0)" * name.isdigit()
            raise DataError(f"{printable(name)}: no image of this class{hint}")
        if len(positions) < 2:
            raise DataError(f"{printable(name)}: a single image in this class, and a split needs two{whole}")
        order = positions[np.argsort(numbers[positions])]
        chosen[order[0]], chosen[order[-1]] = True, False
    if evaluate:
        console.line(f"=> --val-split {share} evaluates {chosen.sum():,} of {counted(len(chosen), 'image')}{whole}")
    training = None if evaluate else ImageFolder(index, ("training", share, np.flatnonzero(~chosen)))
    return training, ImageFolder(index, ("validation", share, np.flatnonzero(chosen)))


def check_same_classes(first: Sequence[str], second: Sequence[str], first_name: str, second_name: str) -> None:
    """Raise UsageError, naming the first difference, if two lists of class names differ by more than their NFC form."""
    for position in range(max(len(first), len(second))):
        a, b = (names[position] if position < len(names) else None for names in (first, second))
        if a is None or b is None or unicodedata.normalize("NFC", a) != unicodedata.normalize("NFC", b):
            a, b = (repr(name) if name is not None else "missing" for name in (a, b))
            raise UsageError(f"the classes differ: number {position} is {a} in {first_name} and {b} in {second_name}")


# --- the embedded digits ----------------------------------------------------------------------------------------------


def read_digits(*, training: bool) -> ArrayDataset:
    """Read the 1,797 embedded handwritten digits (data/README.md). Every fifth is for validation."""
    sheet = np.asarray(Image.open(os.path.join(DATA_FOLDER, "digits.png")))  # cells of 8×8, 60 per row
    with open(os.path.join(DATA_FOLDER, "digits.txt")) as file:
        labels = np.array([int(digit) for digit in "".join(file.read().split())])
    cells = sheet.reshape(sheet.shape[0] // 8, 8, 60, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)[: len(labels)]
    chosen = (np.arange(len(labels)) % 5 == 4) != training
    images = [np.asarray(Image.fromarray(cell).convert("RGB").resize((32, 32), BILINEAR)) for cell in cells[chosen]]
    return ArrayDataset(np.stack(images), labels[chosen], list("0123456789"), DIGITS, default_hflip=0.0)
