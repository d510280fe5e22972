# SPDX-License-Identifier: BSD-3-Clause
"""What a run is: its versions, its classes, and the small files that tell of it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import platform
import subprocess
from typing import Any, Sequence

from engine import console
from engine.errors import UsageError, counted, printable

import numpy as np
import torch

UNBALANCED = 5  # times as large as the smallest class is the largest
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def write_text(path: str, text: str) -> None:
    """Write a file in UTF-8; the bytes of a path that is not UTF-8 stay. Raises UsageError if it cannot be written."""
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def describe_balance(classes: Sequence[str], labels: np.ndarray, weights: Sequence[float] | None = None) -> str:
    """Return the number of classes, and the smallest and the largest of them. weights: of the classes in the loss."""
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    number = counted(len(classes), "class")
    if counts[smallest] == counts[largest]:
        return f"{number} of {counted(counts[largest], 'training image')} each"
    if weights is not None:
        more = f"; --class-weights: {weights[smallest]:.3g} and {weights[largest]:.3g}"
    elif counts[largest] > UNBALANCED * counts[smallest]:
        more = "; --class-weights auto would give every class the same weight in the loss"
    else:
        more = ""
    return (
        f"{number}: the smallest, {printable(classes[smallest])}, has {counted(counts[smallest], 'training image')}, "
        f"the largest, {printable(classes[largest])}, {counts[largest]:,}{more}"
    )


def log_data(
    source: str | None,
    size: int,
    count: int,
    images_per_step: int,
    train_set: Any,
    val_set: Any,
    weights: Sequence[float] | None = None,
) -> None:
    """Log what a run trains and validates on: its name, pixels per side, and the datasets, None if there is none.

    source: None for synthetic images. count: of training images, 0 for an evaluation. weights: of the classes.
    """
    parts = [source or counted(count, "synthetic image")]
    for kind, images in (("training", train_set), ("validation", val_set)):
        if images is not None:
            parts.append(counted(len(images), f"{kind} image"))
    steps, left = divmod(count, images_per_step)
    if count:
        parts.append(f"{counted(steps, 'step')} per epoch, {counted(left, 'image')} left over")
    console.line(f"=> data: {', '.join(parts)}, {size} pixels per side")
    if steps and 10 * left > count:
        console.warning_once_per_node(
            f"each epoch leaves out {left:,} of {counted(count, 'training image')}, too few to fill a step of "
            f"{images_per_step:,}: use a smaller --batch-size"
        )
    if train_set is not None:
        console.line(f"=> {describe_balance(train_set.classes, train_set.labels, weights)}")


def write_bad_images(folder: str, *datasets: Any) -> None:
    """List the unreadable images that datasets leave out in folder/bad_images.txt; without any, remove the old list.

    None in place of a dataset: nothing is known of its images, so the list stays.
    """
    # Both parts of --val-split name the same images.
    unreadable = dict.fromkeys(image for dataset in datasets if dataset is not None for image in dataset.unreadable)
    path = os.path.join(folder, "bad_images.txt")
    if unreadable:
        write_text(path, "".join(f"{name}\t{reason}\n" for name, reason in unreadable))
        console.line(f"=> skipping {counted(len(unreadable), 'unreadable image')}, listed in {path}")
    elif None not in datasets:
        with contextlib.suppress(OSError):
            os.remove(path)


def versions(hardware: str) -> dict[str, Any]:
    """Return what args.json and metrics.json say of the versions. hardware: the name of the device."""
    python = platform.python_version()
    return {"torch": torch.__version__, "python": python, "hardware": hardware, "commit": git_commit()}


def program_files() -> list[str]:
    """Return the paths of the scripts and of everything in engine/."""
    scripts = glob.glob(os.path.join(ROOT, "*.py"))
    return sorted(scripts + glob.glob(os.path.join(ROOT, "engine", "**", "*.py"), recursive=True))


def program_checksum() -> str:
    """Return the start of the SHA-256 of this program's files, which tells two versions of it apart."""
    checksum = hashlib.sha256()
    for path in program_files():
        with open(path, "rb") as file:
            checksum.update(file.read())
    return checksum.hexdigest()[:12]


def git_commit() -> str | None:
    """Return the commit of the clone that this program is in, else None."""
    command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    try:
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # git is not installed
        return None
    return finished.stdout.decode().strip() or None
