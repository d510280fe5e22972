# SPDX-License-Identifier: BSD-3-Clause
"""The files of an evaluation, from predictions that are given."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from typing import Any

from engine.data import Preprocessing
from engine.data.datasets import DIGITS, ArrayDataset
from engine.errors import UsageError
from engine.evaluation.files import check_predictions, write_classes, write_evaluation, write_predictions
from engine.records import Predictions, Totals

import numpy as np
import pytest


@pytest.fixture
def dataset() -> ArrayDataset:
    return ArrayDataset(np.zeros((3, 2, 2, 3), np.uint8), np.array([2, 0, 1]), ["a", "b,", "图"], DIGITS, 0.0)


def predictions_of(dataset: ArrayDataset) -> Predictions:
    predictions = Predictions(3, 3)
    predictions.top5[:] = [[2, 1, 0], [1, 0, 2], [1, 2, 0]]
    predictions.probabilities[:] = [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [1, 0, 0]]
    return predictions


@pytest.mark.parametrize("classes", [2, 3, 5, 1000])
@pytest.mark.parametrize("images", [0, 1, 4])
def test_predictions_of_before_may_be_replaced(tmp_path: Any, classes: int, images: int) -> None:
    path, labels = str(tmp_path / "图 x.csv"), np.zeros(images, np.int64)
    names = [f"class {number}" for number in range(classes)]
    write_predictions(
        path,
        ArrayDataset(np.zeros((images, 2, 2, 3), np.uint8), labels, names, DIGITS, 0.0),
        Predictions(images, classes),
    )
    check_predictions(path)


@pytest.mark.parametrize(
    "content", [b"path", b"path,label,split\n", b"PK\x03\x04", b"path,target,predictions\n", b"\n"]
)
def test_a_file_of_another_kind_is_not_replaced(tmp_path: Any, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match="would overwrite a file of another kind: choose another name"):
        check_predictions(str(tmp_path / "x"))


def test_what_holds_nothing_is_not_looked_into(tmp_path: Any) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(str(tmp_path / "pipe"))  # to read it would wait for a writer
    for name in ("empty", "pipe", "missing", "missing/x"):
        check_predictions(str(tmp_path / name))
    check_predictions(os.devnull)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Any, monkeypatch: Any) -> None:
    def refuse(path: str, *_: Any) -> None:  # to root every file can be read
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / "x").touch()
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UsageError, match="^--predictions .*x: Permission denied$"):
        check_predictions(str(tmp_path / "x"))


def test_predictions_are_a_line_per_image_with_each_class_by_its_name(dataset: Any, tmp_path: Any) -> None:
    path = str(tmp_path / "x.csv")
    write_predictions(path, dataset, predictions_of(dataset))
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header[:6] == ["path", "target", "prediction", "probability", "prediction2", "probability2"]
    assert len(header) == 8
    assert [row[1] for row in rows] == ["图", "a", "b,"] and [row[2] for row in rows] == ["图", "b,", "b,"]
    assert rows[1][2:] == ["b,", "0.500000", "a", "0.400000", "图", "0.100000"]


def test_a_predictions_file_that_cannot_be_written_is_named(dataset: Any, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        write_predictions(str(tmp_path), dataset, predictions_of(dataset))


@pytest.mark.parametrize("loss", [1.5, math.nan, math.inf])
def test_metrics_are_valid_json_whatever_the_loss(dataset: Any, tmp_path: Any, loss: float) -> None:
    facts = {"weights": "图.pth", "data": None}
    files: dict[str, Any] = {"predictions_file": None, "report_folder": None}
    metrics = {**Totals(3, 2, 3, 3 * loss).metrics(), "macro_f1": 55.0, "balanced_acc": 66.0}
    write_evaluation(str(tmp_path), dataset, metrics, None, facts, Preprocessing(32), **files)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert metrics["loss"] == (1.5 if loss == 1.5 else None)
    assert (metrics["images"], metrics["weights"], metrics["data"]) == (3, "图.pth", None)
    assert metrics["acc1"] == pytest.approx(200 / 3) and metrics["macro_f1"] == 55.0


def test_the_tables_of_classes_are_those_of_scikit_learn(tmp_path: Any) -> None:
    """precision_recall_fscore_support and confusion_matrix of the same lists, scikit-learn 1.9.1."""
    labels, predicted = [0] * 6 + [1] * 3 + [2] * 2, [0, 0, 0, 1, 2, 0, 1, 1, 0, 2, 1]
    names = ["a", 'b, "c"', "图"]
    dataset = ArrayDataset(np.zeros((11, 2, 2, 3), np.uint8), np.array(labels), names, DIGITS, 0.0)
    predictions = Predictions(11, 3)
    predictions.top5[:, 0] = predicted
    write_classes(str(tmp_path), dataset, predictions)
    tables = {}
    for name in ("per_class", "confusion"):
        with open(str(tmp_path / f"{name}.csv"), encoding="utf-8", newline="") as file:
            tables[name] = list(csv.reader(file))
    assert tables["confusion"] == [["actual", *names], *([n, *r] for n, r in zip(names, ("411", "120", "011")))]
    assert tables["per_class"] == [
        ["class", "images", "predicted", "correct", "precision", "recall", "f1"],
        [names[0], "6", "5", "4", "80.000000", "66.666667", "72.727273"],
        [names[1], "3", "4", "2", "50.000000", "66.666667", "57.142857"],
        [names[2], "2", "2", "1", "50.000000", "50.000000", "50.000000"],
    ]
