# SPDX-License-Identifier: BSD-3-Clause
"""The evaluation page, from predictions that are given."""

from __future__ import annotations

import importlib.util
import re
import tracemalloc
from typing import Any

from engine.data.datasets import DIGITS, ArrayDataset
from engine.errors import ImageError
from engine.evaluation.page import MAX_MISTAKES, Confusion, percent, render_page
from engine.records import Predictions, Totals

import numpy as np
import pytest

needs_jinja2 = pytest.mark.skipif(importlib.util.find_spec("jinja2") is None, reason="jinja2 is not installed")
FACTS = {"arch": "vgg11", "weights": "a <b>.pth", "data": "/data", "lr": None, "amp": False}


def render(labels: np.ndarray, predicted: np.ndarray, classes: list[str], preprocessing: Any = None) -> str:
    """The page of images without pixels."""
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    dataset = ArrayDataset(images, labels, classes, DIGITS, default_hflip=0.0)
    predictions = Predictions(len(labels), len(classes))
    predictions.top5[:, 0], predictions.probabilities[:, 0] = predicted, np.linspace(0.1, 0.9, len(labels))
    correct = int((labels == predicted).sum())
    totals = Totals(len(labels), correct, correct, 1.0)
    return render_page(dataset, totals.metrics(), predictions, FACTS, preprocessing or (lambda source: source), None)


def dense(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return matrix


@pytest.mark.parametrize("classes", [1, 2, 7, 40])
def test_confusions_are_those_of_the_dense_matrix(classes: int) -> None:
    rng = np.random.RandomState(classes)
    labels, predicted = rng.randint(0, classes, (2, 300))
    labels[labels == 3] = 0  # a class without images
    matrix, confusion = dense(labels, predicted, classes), Confusion(labels, predicted, classes)
    assert list(confusion.matrix()) == matrix.tolist()
    assert confusion.counts().tolist() == [matrix.sum(1).tolist(), matrix.sum(0).tolist(), np.diag(matrix).tolist()]
    errors = matrix - np.diag(np.diag(matrix))
    expected = [divmod(cell, classes) for cell in np.argsort(-errors, axis=None, kind="stable").tolist()]
    pairs = [(a, p, int(matrix[a, p]), int(matrix[a].sum())) for a, p in expected if errors[a, p]]
    assert confusion.pairs() == pairs[:25]
    rows = {row[0]: row[1:] for row in confusion.by_class()}
    assert len(rows) == classes
    for label, (images, as_predicted, correct, confused_with, confused) in rows.items():
        assert (images, as_predicted, correct) == (matrix[label].sum(), matrix[:, label].sum(), matrix[label, label])
        assert confused == errors[label].max() and confused_with == (errors[label].argmax() if confused else 0)
    recalls = [correct / max(images, 1) for _, images, _, correct, _, _ in confusion.by_class()]
    assert recalls == sorted(recalls)


@needs_jinja2
def test_names_are_escaped_and_the_numbers_are_the_counts() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    page = render(labels, predicted, ['"><script>x', "a\n 图\udcff"])
    assert "<script>x" not in page and "&lt;script&gt;x" in page and "a 图?" in page
    assert "a &lt;b&gt;.pth, /data" in page
    assert ">lr<" not in page and ">amp<" not in page  # flags that are not set
    cells = re.findall(r'title="actual .*?, predicted .*?: (\d+)"', page)
    assert cells == ["2", "1", "1", "1"]
    assert "<b>60.00%</b>Acc@1" in page and "<b>2</b>wrong of 5" in page


@needs_jinja2
def test_images_that_cannot_be_read_any_more_are_left_out() -> None:
    shown_before: list[int] = []

    def read(source: np.ndarray) -> np.ndarray:  # the mistakes from the most confident one on: 99, 98, …
        shown_before.append(1)
        if len(shown_before) % 2:
            raise ImageError("gone")
        return source

    page = render(np.zeros(100, np.int64), np.ones(100, np.int64), ["a", "b"], read)
    shown = [int(number) for number in re.findall(r"<small>image (\d+)</small>", page)]
    assert len(shown) == MAX_MISTAKES and shown == sorted(shown, reverse=True)
    assert not [number for number in shown if number % 2]


@needs_jinja2
def test_without_a_mistake_the_page_says_so() -> None:
    page = render(np.array([0, 1]), np.array([0, 1]), ["a", "b"])
    assert page.count("<p>None.</p>") == 2 and "<figure>" not in page


@needs_jinja2
def test_ten_thousand_classes_take_little_memory_and_have_a_row_each() -> None:
    """The dense matrix alone would take 800 MB."""
    labels, predicted = np.random.RandomState(0).randint(0, 10000, (2, 50000))
    tracemalloc.start()
    confusion = Confusion(labels, predicted, 10000)
    assert len(confusion.by_class()) == 10000 and len(confusion.pairs()) == 25
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    page = render(labels, predicted, [f"class {number}" for number in range(10000)])
    assert page.count("<tr>") == 10000 + 25 + 5
    assert len(page) < 5e6


@pytest.mark.parametrize("part, total, text", [(1, 3, "33.3%"), (0, 5, "0.0%"), (0, 0, "–")])
def test_percentages(part: int, total: int, text: str) -> None:
    assert percent(part, total) == text
