# SPDX-License-Identifier: BSD-3-Clause
"""--class-weights: the file of a user, and the weights that come of it."""

from __future__ import annotations

import csv
from typing import Any

from engine.errors import UsageError
from engine.options.class_weights import class_weights, resolve_class_weights
from engine.options.flags import parse_args

import numpy as np
import pytest

LABELS = np.repeat([0, 1, 2], [6, 3, 1])


def test_automatic_class_weights_are_those_of_scikit_learn_with_a_mean_of_1_over_the_images() -> None:
    weights = resolve_class_weights("auto", ["a", "b", "c"], LABELS)
    # sklearn.utils.class_weight.compute_class_weight("balanced", classes=[0, 1, 2], y=LABELS), scikit-learn 1.9.1
    assert weights == pytest.approx([0.5555555555555556, 1.1111111111111112, 3.3333333333333335])
    assert np.array(weights)[LABELS].mean() == pytest.approx(1)
    assert resolve_class_weights(None, ["a", "b", "c"], LABELS) is None


@pytest.mark.parametrize(
    "rows", [[["", 1], ["", 2], ["", 4]], [["c", 4], ["e\u0301", 1], ["b", 2]]], ids=["in order", "by name"]
)
def test_given_class_weights_keep_their_ratios(rows: list[list[Any]]) -> None:
    weights = resolve_class_weights(rows, ["\u00e9", "b", "c"], LABELS)
    assert weights == pytest.approx([value / 1.6 for value in (1, 2, 4)])


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_automatic_class_weights_leave_out_a_class_without_images(missing: int) -> None:
    present = [label for label in range(4) if label != missing]
    weights = resolve_class_weights("auto", list("abcd"), np.repeat(present, [6, 3, 1]))
    assert weights is not None and weights[missing] == 0
    assert [weights[label] for label in present] == pytest.approx([10 / 18, 10 / 9, 10 / 3])


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-30, 1, 1e30, 1e300, 4e307])
def test_class_weights_of_any_size_keep_their_ratios(scale: float) -> None:
    weights = resolve_class_weights([["", scale], ["", 2 * scale], ["", 4 * scale]], ["a", "b", "c"], LABELS)
    assert weights == pytest.approx([value / 1.6 for value in (1, 2, 4)], rel=1e-3)  # 1e-320 has three digits


@pytest.mark.parametrize(
    "rows, message",
    [
        ([["", 1], ["", 2]], "expected 3 weights, one per class, got 2"),
        ([["a", 1], ["b", 2], ["c", 1], ["a", 5]], "expected 3 weights, one per class, got 4"),
        ([["a", 1], ["b", 2]], "the file has no class 'c'"),
        ([["a", 1], ["b", 2], ["c", 1], ["d", 1]], "the data has no class 'd'"),
        ([["", 0], ["", 0], ["", 0]], "weights of all training images are 0"),
    ],
)
def test_class_weights_that_do_not_fit_the_classes_are_refused(rows: list[list[Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_class_weights(rows, ["a", "b", "c"], LABELS)


@pytest.mark.parametrize("text", ["class\tweight\ncat, big\t1.5\n\ndog\t0\n", "\ufeffcat, big,1.5\r\n dog , 0\r\n"])
def test_class_weights_have_names_with_a_comma_or_a_tab_after_them(tmp_path: Any, text: str) -> None:
    (tmp_path / "w.csv").write_bytes(text.encode("utf-8"))
    assert class_weights(str(tmp_path / "w.csv")) == [["cat, big", 1.5], ["dog", 0.0]]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_class_weights_are_read_as_programs_write_tables(tmp_path: Any, quoting: int, delimiter: str, end: str) -> None:
    rows = [["tench, Tinca tinca", 1.5], ['5" pipe', 0.5], ["cat", 2.0], ["a,b,c", 1.0], ["it's", 3.0], ["7", 4.0]]
    for header in ([], [["class", "weight"]], [["Class", "Weight"]]):
        with open(str(tmp_path / "w.csv"), "w", newline="") as file:
            csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([*header, *rows])
        assert class_weights(str(tmp_path / "w.csv")) == rows


def test_class_weights_without_names_are_one_per_line(tmp_path: Any) -> None:
    (tmp_path / "w.txt").write_text("1\n2e-1\n")
    assert class_weights(str(tmp_path / "w.txt")) == [["", 1.0], ["", 0.2]] and class_weights("auto") == "auto"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"1\n-1\n", "w.txt, line 2: must be at least 0, got -1"),
        (b"cat,nan\n", "w.txt, line 1: must be finite, got nan"),
        (b"cat,1\ndog,\n", "w.txt, line 2: expected a number, got ''"),
        (b"\xff\n", "not UTF-8"),
        ("cat,1\n".encode("utf-16-le"), "w.txt"),
        (None, "No such file"),
    ],
)
def test_class_weights_that_make_no_sense_are_one_line(tmp_path: Any, capsys: Any, content: Any, message: str) -> None:
    if content is not None:
        (tmp_path / "w.txt").write_bytes(content)
    with pytest.raises(SystemExit):
        parse_args(["--class-weights", str(tmp_path / "w.txt")])
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
