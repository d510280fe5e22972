# SPDX-License-Identifier: BSD-3-Clause
"""The evaluation page: one HTML file with its images and figures inside. The template is page.html."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
from itertools import islice
from typing import Any, Iterator

from engine.data import ImageDataset, Preprocessing
from engine.records import Predictions, svg_curves

import numpy as np
from PIL import Image

MAX_MATRIX_CLASSES = 25  # with more classes, the cells are too small
MAX_PAIRS = 25
MAX_MISTAKES = 24
LIGHT, DARK = "#4b5563", "#aab3bf"  # text of the curves on a light and on a dark page


def render_page(
    dataset: ImageDataset,
    metrics: dict[str, float],
    predictions: Predictions,
    facts: dict[str, Any],
    preprocessing: Preprocessing,
    training_folder: str | None,
) -> str:
    """Return the page. For the arguments, see write_evaluation. Requires jinja2 and matplotlib."""
    import jinja2

    classes = [" ".join(name.split()) for name in dataset.classes]
    labels, predicted, confidence = np.asarray(dataset.labels), predictions.predicted, predictions.confidence
    confusion = Confusion(labels, predicted, len(classes))
    mistakes = np.flatnonzero(predicted != labels)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")]
    with open(os.path.join(os.path.dirname(__file__), "page.html"), encoding="utf-8") as file:
        template = jinja2.Template(file.read(), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = template.render(
        percent=percent,
        data_uri=data_uri,
        title=f"{facts['arch']}: {metrics['acc1']:.2f}% Acc@1",
        subtitle=", ".join(str(facts[key]) for key in ("weights", "data", "hardware") if key in facts),
        metrics=metrics,
        images=len(labels),
        classes=classes,
        curves=list(zip(*(svg_curves(training_folder, color) for color in (LIGHT, DARK)))) if training_folder else [],
        wrong=len(mistakes),
        mistakes=list(islice(read_mistakes(dataset, predictions, mistakes, preprocessing), MAX_MISTAKES)),
        matrix=list(confusion.matrix()) if len(classes) <= MAX_MATRIX_CLASSES else None,
        pairs=confusion.pairs(),
        rows=confusion.by_class(),
        tables={"This evaluation": facts, "Flags of the training": read_flags(training_folder)},
    )
    return page.encode("utf-8", "replace").decode()  # paths and classes may have other bytes


def percent(part: float, total: float) -> str:
    """Format part/total as a percentage, or a dash if total is 0."""
    return f"{100 * part / total:.1f}%" if total else "–"


def data_uri(kind: str, content: bytes) -> str:
    """Return what a page has in place of the address of an image. kind: png, jpeg or svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


class Confusion:
    """How many images there are of each pair of an actual and a predicted class.

    Only pairs that occur are kept: the matrix of 10,000 classes would take 800 MB.
    """

    def __init__(self, actual: np.ndarray, predicted: np.ndarray, classes: int) -> None:
        cells, self.images = np.unique(actual * classes + predicted, return_counts=True)
        self.actual, self.predicted, self.classes = cells // classes, cells % classes, classes
        self.wrong = np.flatnonzero(self.actual != self.predicted)

    def per_class(self, labels: np.ndarray, pairs: Any = slice(None)) -> np.ndarray:
        """Return the number of images of each class. labels: self.actual or self.predicted. pairs: those to count."""
        return np.bincount(labels[pairs], self.images[pairs], self.classes).astype(np.int64)

    def counts(self) -> np.ndarray:
        """Return (3, classes) int64: the images of each class, those predicted as it, and those of both."""
        correct = self.per_class(self.actual, self.actual == self.predicted)
        return np.stack([self.per_class(self.actual), self.per_class(self.predicted), correct])

    def matrix(self) -> Iterator[list[int]]:
        """Yield a row per actual, with a column per predicted class."""
        for label in range(self.classes):
            yield self.per_class(self.predicted, self.actual == label).tolist()

    def pairs(self) -> list[tuple[int, int, int, int]]:
        """Return (actual, predicted, images, images of the actual class) of the pairs confused most often."""
        order = self.wrong[np.argsort(-self.images[self.wrong], kind="stable")][:MAX_PAIRS]
        actual = self.actual[order]
        return _rows(actual, self.predicted[order], self.images[order], self.per_class(self.actual)[actual])

    def by_class(self) -> list[tuple[int, int, int, int, int, int]]:
        """Return a row per class, the lowest recall first: (class, images, predicted, correct, confused with, images).

        The last two: the class that it is confused with most, and how often.
        """
        images, predicted, correct = self.counts()
        pairs = self.wrong[np.lexsort((-self.images[self.wrong], self.actual[self.wrong]))]
        confused, first = np.unique(self.actual[pairs], return_index=True)
        most = np.zeros((2, self.classes), np.int64)
        most[:, confused] = self.predicted[pairs[first]], self.images[pairs[first]]
        order = np.lexsort((-images, correct / np.maximum(images, 1)))
        return _rows(order, *(column[order] for column in (images, predicted, correct, *most)))


def _rows(*columns: np.ndarray) -> list[Any]:
    return list(zip(*(column.tolist() for column in columns)))


def read_flags(folder: str | None) -> dict[str, object]:
    """Return the flags of the training from its args.json; none if the folder has none."""
    if folder is not None:
        path = os.path.join(folder, "args.json")
        with contextlib.suppress(OSError, ValueError, KeyError), open(path, encoding="utf-8") as file:
            return json.load(file)["flags"]
    return {}


def read_mistakes(
    dataset: ImageDataset, predictions: Predictions, mistakes: np.ndarray, preprocessing: Preprocessing
) -> Iterator[dict[str, Any]]:
    """Yield what the page shows of each mistake that can still be read. `mistakes`: sorted indices."""
    for index in mistakes.tolist():
        with contextlib.suppress(Exception):  # it was readable during the evaluation, and may be gone now
            image = Image.fromarray(np.ascontiguousarray(preprocessing(dataset.read(index))))
            content, kind = io.BytesIO(), "png" if image.width <= 64 else "jpeg"
            image.save(content, kind, quality=88)
            yield {
                "kind": kind,
                "content": content.getvalue(),
                "predicted": predictions.predicted[index],
                "confidence": predictions.confidence[index],
                "actual": dataset.labels[index],
                "name": dataset.short_name(index),
            }
