# SPDX-License-Identifier: BSD-3-Clause
"""CIFAR-10 and CIFAR-100 in both formats of their archives (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/)."""

from __future__ import annotations

import os
from typing import IO, Any, Callable, NamedTuple, Sequence

from engine import console
from engine.data.transforms import Preprocessing
from engine.errors import DataError, counted, printable
from engine.safe_pickle import load_arrays

import numpy as np


class Cifar(NamedTuple):
    """One of the datasets. Its binary files are named as the pickles of the Python version are, with .bin behind."""

    title: str
    folders: tuple[str, str]  # in the archives: Python version, binary version
    train: tuple[str, ...]
    test: str
    key: bytes  # of the labels in a pickle
    label_bytes: int  # in front of an image in a binary file; the last is the class
    preprocessing: Preprocessing  # mean and standard deviation of the training images
    class_count: int
    classes: tuple[str, ...] = ()  # else in a file of the archive


CIFAR10 = Cifar(
    "CIFAR-10",
    ("cifar-10-batches-py", "cifar-10-batches-bin"),
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    key=b"labels",
    label_bytes=1,
    preprocessing=Preprocessing(32, crop=False, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    class_count=10,
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
# The 100 fine classes. The 20 coarse ones are left out.
CIFAR100 = Cifar(
    "CIFAR-100",
    ("cifar-100-python", "cifar-100-binary"),
    train=("train",),
    test="test",
    key=b"fine_labels",
    label_bytes=2,
    preprocessing=Preprocessing(32, crop=False, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    class_count=100,
)


def find_cifar(root: str) -> tuple[Cifar, str, bool] | None:
    """Return the dataset in `root` or, as unpacked, below it: which, its folder, and whether it is the binary version.

    None if there is none. Raises DataError if both are there.
    """
    found = {}
    for cifar in (CIFAR100, CIFAR10):
        names = [] if cifar.classes else ["meta", "fine_label_names.txt"]  # else any file `test` would be CIFAR-100
        for folder in (root, *(os.path.join(root, name) for name in cifar.folders)):
            for binary in (True, False):
                files = [f"{cifar.test}.bin" if binary else cifar.test, *names[binary : binary + 1]]
                if all(os.path.isfile(os.path.join(folder, name)) for name in files):
                    found[cifar.title] = cifar, folder, binary
    if len(found) > 1:
        folders = " or ".join(printable(folder) for _, folder, _ in found.values())
        raise DataError(f"{printable(root)}: CIFAR-10 and CIFAR-100 are in it: use {folders}")
    return next(iter(found.values()), None)


def read_cifar(cifar: Cifar, folder: str, binary: bool, *, training: bool) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return (N, 32, 32, 3) uint8 images, (N,) int64 labels, and the names of the classes.

    Warns if a file has another number of images than the published one: it may be cut off between two of them. Raises
    DataError if a file is missing or has another format.
    """
    names = [name + (".bin" if binary else "") for name in (cifar.train if training else [cifar.test])]
    parts = [_read(cifar, os.path.join(folder, name), _read_binary if binary else _read_pickle) for name in names]
    published = 50_000 // len(cifar.train) if training else 10_000
    counts = {name: len(numbers) for name, (_, numbers) in zip(names, parts)}
    others = [f"{name} has {counted(count, 'image')}" for name, count in counts.items() if count != published]
    if others:
        console.line(f"=> warning: {printable(folder)}: {', '.join(others)}; as published, {published:,} each")
    classes = cifar.classes
    if not classes:
        name, reader = ("fine_label_names.txt", _read_names) if binary else ("meta", _read_meta)
        classes = _read(cifar, os.path.join(folder, name), reader)
    planes = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([numbers for _, numbers in parts])
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels, list(classes)


def _read(cifar: Cifar, path: str, reader: Callable[[Cifar, IO[bytes]], Any]) -> Any:
    try:
        with open(path, "rb") as file:
            return reader(cifar, file)
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}") from error
    except Exception as error:  # a corrupt pickle raises nearly any type
        raise DataError(f"{printable(path)}: not a {cifar.title} file ({error})") from error


def _read_binary(cifar: Cifar, file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    records = np.frombuffer(file.read(), np.uint8).reshape(-1, cifar.label_bytes + 3072)
    return _checked(cifar, records[:, cifar.label_bytes :], records[:, cifar.label_bytes - 1])


def _read_pickle(cifar: Cifar, file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
    record = load_arrays(file)
    return _checked(cifar, record[b"data"], np.asarray(record[cifar.key]))


def _checked(cifar: Cifar, pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = cifar.class_count - 1
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels {labels.shape} of {labels.dtype}, expected integers, one per image")
    if not len(labels) or pixels.shape != (len(labels), 3072) or labels.min() < 0 or labels.max() > largest:
        raise ValueError(f"images {pixels.shape}, labels {labels.shape}, not all from 0 to {largest}")
    return pixels, labels


def _read_names(cifar: Cifar, file: IO[bytes]) -> list[str]:
    return _named(cifar, file.read().split())


def _read_meta(cifar: Cifar, file: IO[bytes]) -> list[str]:
    return _named(cifar, load_arrays(file)[b"fine_label_names"])


def _named(cifar: Cifar, names: Sequence[bytes]) -> list[str]:
    if len(names) != cifar.class_count:
        raise ValueError(f"{len(names)} names of classes, expected {cifar.class_count}")
    return [name.decode("ascii") for name in names]
