# SPDX-License-Identifier: BSD-3-Clause
"""The files of an evaluation: metrics.json, a CSV file with a line per image, the evaluation page."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
from typing import Any, Callable

from engine.checkpoints.contents import BEST, LATEST
from engine.data.datasets import ImageDataset, ImageFolder
from engine.errors import UsageError
from engine.evaluation.page import write_report
from engine.records.metrics import Predictions, Totals


def write_evaluation(
    args: argparse.Namespace,
    dataset: ImageDataset,
    totals: Totals,
    predictions: Predictions | None,
    facts: dict[str, Any],
    log: Callable[[str], None],
) -> None:
    """Write metrics.json, and the files of --predictions and --report. Raises UsageError.

    facts: versions, hardware, weights and data.
    """
    flags = ["arch", "val_split", "image_size", "eval_view", "eval_scales", "precision", "batch_size"]
    facts = {**{name: getattr(args, name) for name in flags}, **facts}
    log(f"=> metrics written to {write_metrics(args.output_dir, totals, facts)}")
    if args.predictions and predictions is not None:
        write_predictions(args.predictions, dataset, predictions)
        log(f"=> predictions written to {args.predictions}")
    if args.report and predictions is not None:
        folder, name = os.path.split(str(facts["weights"]))
        path = write_report(
            args.report,
            dataset,
            predictions,
            totals,
            title=f"{args.arch}: {totals.acc1:.2f}% Acc@1",
            image_size=args.image_size,
            facts=facts,
            training_folder=(folder or ".") if name.startswith((LATEST, BEST)) else None,
        )
        log(f"=> report written to {path}")


def write_metrics(folder: str, totals: Totals, facts: dict[str, Any]) -> str:
    """Write folder/metrics.json and return its path. Raises UsageError if it cannot be written.

    facts: what was evaluated, and on what.
    """
    metrics = {name: value if math.isfinite(value) else None for name, value in totals.metrics().items()}
    content = json.dumps({**metrics, "images": int(totals.images), **facts}, indent=2, ensure_ascii=False)
    path = os.path.join(folder, "metrics.json")
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{content}\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return path


def write_predictions(path: str, dataset: ImageDataset, predictions: Predictions) -> None:
    """Write a CSV file with a line per image. Raises UsageError if it cannot be written.

    Columns: path (of a folder's image, else its number), target, prediction, probability, and the same two for the
    second to the fifth prediction.
    """
    count = predictions.top5.shape[1]
    header = ["path", "target", "prediction", "probability"]
    header += [f"{name}{rank}" for rank in range(2, count + 1) for name in ("prediction", "probability")]
    try:
        with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for index, (top5, probabilities) in enumerate(zip(predictions.top5, predictions.probabilities)):
                row = [
                    dataset.path(index) if isinstance(dataset, ImageFolder) else index,
                    dataset.classes[dataset.labels[index]],
                ]
                for label, probability in zip(top5, probabilities):
                    row += [dataset.classes[label], f"{probability:.6f}"]
                writer.writerow(row)
    except OSError as error:
        raise UsageError(f"--predictions {path}: {error.strerror}") from error
