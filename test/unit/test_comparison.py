# SPDX-License-Identifier: BSD-3-Clause
"""Two models compared on the validation images."""

from __future__ import annotations

import os
from typing import Any

from engine.data import Preprocessing
from engine.errors import DataError, ImageError, UsageError
from engine.evaluation.comparison import Outcome, classify, open_images, read_images

from helpers.images import make_folder

import numpy as np
import pytest
import torch

NAMES = ["class 0", "class 1", "class 2"]


def open_val(folder: Any) -> Any:
    return open_images(str(folder), NAMES, None, renamed=False, training=False)[1]


def brightest(images: torch.Tensor) -> torch.Tensor:
    """Scores (N, 3): the mean of each channel."""
    return images.float().mean((1, 2))


@pytest.mark.parametrize("batch_size", [1, 4, 15, 100])
def test_every_image_is_predicted_once_whatever_the_batch(folder: str, batch_size: int) -> None:
    val = open_val(folder)
    outcome = classify(val, Preprocessing(32), brightest, batch_size)
    pixels = np.stack([Preprocessing(32)(val.read(index)) for index in range(len(val))])
    assert np.array_equal(outcome.predicted, pixels.mean((1, 2)).argmax(1))
    assert np.array_equal(outcome.targets, val.labels) and outcome.images_per_second > 0


def test_images_are_read_in_the_order_of_the_indices(folder: str) -> None:
    val = open_val(folder)
    parts = list(read_images(val, Preprocessing(32), np.array([14, 2, 7]), 2))
    assert [len(images) for images, _ in parts] == [2, 1]
    assert torch.cat([labels for _, labels in parts]).tolist() == val.labels[[14, 2, 7]].tolist()


def test_the_words_say_both_accuracies_and_the_share_of_equal_predictions() -> None:
    targets = np.array([0, 1, 2, 2])
    before, after = Outcome(np.array([0, 1, 2, 2]), targets, 10.0), Outcome(np.array([0, 1, 0, 1]), targets, 20.0)
    assert (before.acc1, after.acc1) == (100, 50)
    assert after.describe(before) == (
        "top-1 accuracy 50.00% (checkpoint 100.00%), 50.00% of 4 predictions equal, images/s 20.0 (torch 10.0)"
    )


def test_an_image_that_cannot_be_read_is_named(tmp_path: Any) -> None:
    make_folder(tmp_path, train=1, val=2)
    path = os.path.join(str(tmp_path), "val", "class 1", "图 001.JPEG")
    with open(path, "wb") as file:
        file.write(b"not an image")
    with pytest.raises(ImageError, match="图 001.JPEG"):
        classify(open_val(tmp_path), Preprocessing(32), brightest, 4)


def test_validation_images_alone_are_enough_unless_training_images_are_wanted(tmp_path: Any) -> None:
    make_folder(tmp_path, train=0, val=2)
    os.rename(str(tmp_path / "train"), str(tmp_path / "nothing"))
    assert len(open_val(tmp_path)) == 6
    with pytest.raises(DataError, match="no train/"):
        open_images(str(tmp_path), NAMES, None, renamed=False, training=True)


def test_the_split_of_the_checkpoint_is_that_of_the_comparison(tmp_path: Any) -> None:
    make_folder(tmp_path, train=8, val=0)
    train, val = open_images(str(tmp_path / "train"), NAMES, 0.3, renamed=False, training=True)
    assert train is not None and len(train) + len(val) == 24
    assert not {train.name(index) for index in range(len(train))} & {val.name(index) for index in range(len(val))}


@pytest.mark.parametrize(
    "classes, renamed, fits",
    [
        (NAMES, False, True),
        (["0", "1", "2"], False, True),  # a checkpoint that knows no names
        (["a", "b", "c"], True, True),
        (["class 0", "class 1", "class 9"], False, False),
        (["0", "1"], False, False),
        (["a", "b", "c", "d"], True, False),
    ],
)
def test_the_classes_must_be_those_of_the_checkpoint(
    folder: str, classes: list[str], renamed: bool, fits: bool
) -> None:
    try:
        open_images(folder, classes, None, renamed=renamed, training=False)
        assert fits
    except UsageError as error:
        assert not fits and "class" in str(error)
