# SPDX-License-Identifier: BSD-3-Clause
"""What a smaller form of a model costs: the predictions of both on the validation images."""

from __future__ import annotations

import time
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from engine import console
from engine.data import ImageBatches, ImageDataset, Preprocessing, check_same_classes, open_datasets
from engine.errors import UsageError, UserError, counted

import numpy as np
import torch


class Outcome(NamedTuple):
    """What a model predicts."""

    predicted: np.ndarray  # (N,) classes
    targets: np.ndarray
    images_per_second: float

    @property
    def acc1(self) -> float:
        """Top-1 accuracy, percent."""
        return 100 * float(np.mean(self.predicted == self.targets))

    def describe(self, other: Outcome) -> str:
        """Return this outcome beside that of the model it was made from."""
        same = np.mean(self.predicted == other.predicted)
        return (
            f"top-1 accuracy {self.acc1:.2f}% (checkpoint {other.acc1:.2f}%), {same:.2%} of {len(self.targets):,} "
            f"predictions equal, images/s {self.images_per_second:.1f} (torch {other.images_per_second:.1f})"
        )


def open_images(
    path: str, classes: Sequence[str], saved_val_split: float | None, *, renamed: bool, training: bool
) -> tuple[ImageDataset | None, Any]:
    """Return the training images, None unless `training`, and the validation images below a folder.

    classes, saved_val_split: the checkpoint's. renamed: the class names are not those of its folders, as numbers are
    not. Raises DataError, or UsageError if the classes differ.
    """
    train, val = open_datasets(path, evaluate=not training, skip_unreadable=False, saved_val_split=saved_val_split)
    assert val is not None
    if not renamed and list(classes) != [str(number) for number in range(len(classes))]:
        check_same_classes(classes, val.classes, "the checkpoint", "the data")
    if len(val.classes) != len(classes):
        raise UsageError(f"{path}: {counted(len(val.classes), 'class')}, the checkpoint has {len(classes)}")
    return train, val


def read_images(
    dataset: ImageDataset, preprocessing: Preprocessing, indices: np.ndarray, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images (N, S, S, 3) uint8, targets) of a dataset. Raises ImageError for one that cannot be read."""
    batches = ImageBatches(dataset, preprocessing)
    for part in np.split(indices, range(batch_size, len(indices), batch_size)):
        batch = batches[0, part]
        if isinstance(batch, UserError):
            raise batch
        yield batch[0], batch[1]


def classify(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    predict: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
) -> Outcome:
    """Predict all images of a dataset. predict: from (N, S, S, 3) uint8 to logits, and what the time is taken of."""
    predicted, targets, seconds = [], [], 0.0
    with torch.no_grad(), console.progress(len(dataset), 0, "Compare"):
        for images, target in read_images(dataset, preprocessing, np.arange(len(dataset)), batch_size):
            begin = time.perf_counter()
            predicted.append(predict(images).argmax(1))
            seconds += time.perf_counter() - begin
            targets.append(target)
            console.advance(len(target))
    return Outcome(torch.cat(predicted).numpy(), torch.cat(targets).numpy(), len(dataset) / seconds)
