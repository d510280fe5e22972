# SPDX-License-Identifier: BSD-3-Clause
"""The files of an evaluation: metrics.json, a CSV file with a line per image, the evaluation page."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from typing import Any

from engine import console
from engine.data import ImageDataset, Preprocessing
from engine.errors import UsageError
from engine.evaluation.page import Confusion, render_page
from engine.records import Predictions, class_scores, run_info

HEADER = b"path,target,prediction,"  # how a file of --predictions begins


def check_predictions(path: str) -> None:
    """Raise UsageError if a file would be replaced that holds no predictions, such as a checkpoint or a list."""
    if not os.path.isfile(path):  # also a pipe, which must not be read
        return
    try:
        with open(path, "rb") as file:
            start = file.read(len(HEADER))
    except OSError as error:
        raise UsageError(f"--predictions {path}: {error.strerror}") from error
    if start not in (b"", HEADER):
        raise UsageError(f"--predictions {path}: would overwrite a file of another kind: choose another name")


def write_evaluation(
    folder: str,
    dataset: ImageDataset,
    metrics: dict[str, float],
    predictions: Predictions | None,
    facts: dict[str, Any],
    preprocessing: Preprocessing,
    *,
    predictions_file: str | None,
    report_folder: str | None,
) -> None:
    """Write folder/metrics.json, and the files of --predictions and --report, if any. Raises UsageError.

    The folders exist already.

    Args:
        predictions: of all images; needed for --predictions and --report.
        facts: how `weights` were evaluated on what `data` and `hardware`, and versions.
        preprocessing: what makes the network's input of an image.
    """
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    record = {**finite, "images": len(dataset), **facts}
    path = os.path.join(folder, "metrics.json")
    run_info.write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    console.line(f"=> metrics written to {path}")
    if predictions_file and predictions is not None:
        write_predictions(predictions_file, dataset, predictions)
        console.line(f"=> predictions written to {predictions_file}")
    if report_folder and predictions is not None:
        path = os.path.join(report_folder, "index.html")
        parent, name = os.path.split(facts["weights"])
        # Beside its checkpoints a training leaves its flags and curves.
        training_folder = (parent or ".") if name.startswith(("checkpoint.pth.tar", "model_best.pth.tar")) else None
        run_info.write_text(path, render_page(dataset, metrics, predictions, facts, preprocessing, training_folder))
        write_classes(report_folder, dataset, predictions)
        console.line(f"=> report written to {path}")


def write_predictions(path: str, dataset: ImageDataset, predictions: Predictions) -> None:
    """Write a CSV file with a line per image. Raises UsageError if it cannot be written.

    Columns: path (of a folder's image, else its number), target, prediction, probability, and the same two for the
    second to the fifth prediction.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(2, predictions.top5.shape[1] + 1)
    more = [f"{name}{rank}" for rank in ranks for name in ("prediction", "probability")]
    writer.writerow(["path", "target", "prediction", "probability", *more])
    for index, (top5, probabilities) in enumerate(zip(predictions.top5, predictions.probabilities)):
        row = [dataset.name(index), dataset.classes[dataset.labels[index]]]
        for label, probability in zip(top5, probabilities):
            row += [dataset.classes[label], f"{probability:.6f}"]
        writer.writerow(row)
    run_info.write_text(path, text.getvalue())


def write_classes(folder: str, dataset: ImageDataset, predictions: Predictions) -> None:
    """Write folder/per_class.csv and folder/confusion.csv. Raises UsageError if one cannot be written.

    per_class.csv: a line per class with its number of images, of those predicted as it, of both, and its scores in
    percent. confusion.csv: a line per actual, a column per predicted class.
    """
    confusion = Confusion(dataset.labels, predictions.predicted, len(dataset.classes))
    names = ("class", "images", "predicted", "correct", "precision", "recall", "f1")
    counts = confusion.counts()
    rows = [[*row, *(f"{score:.6f}" for score in scores)] for row, scores in zip(counts.T, class_scores(counts).T)]
    tables = {"per_class.csv": (names, rows), "confusion.csv": (("actual", *dataset.classes), confusion.matrix())}
    for file, (header, lines) in tables.items():
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([name, *line] for name, line in zip(dataset.classes, lines))
        run_info.write_text(os.path.join(folder, file), text.getvalue())
