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
from engine.evaluation.page import render_page
from engine.records import Predictions, Totals, run_info


def write_evaluation(
    folder: str,
    dataset: ImageDataset,
    totals: Totals,
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
    metrics = {name: value if math.isfinite(value) else None for name, value in totals.metrics().items()}
    record = {**metrics, "images": int(totals.images), **facts}
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
        run_info.write_text(path, render_page(dataset, totals, predictions, facts, preprocessing, training_folder))
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
