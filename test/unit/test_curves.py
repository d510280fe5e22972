# SPDX-License-Identifier: BSD-3-Clause
"""The curves drawn from metrics.jsonl, and the confusion matrix."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

from engine.records import curves
from engine.records.curves import PANELS, draw_confusion, draw_curves, read_events, save_curves, shorten, text_width
from helpers.program import run_main

import numpy as np
import pytest

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def write_metrics(folder: Any, *records: dict) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def start(step: int) -> dict:
    return {"event": "start", "epoch": 0, "step": step}


def epoch(number: int, loss: float | None, event: str = "epoch") -> dict:
    """The event of an epoch of ten steps; epochs count from 0."""
    rest = {} if event == "validate" else {"lr": 0.1, "images_per_second": 100.0}
    return {"event": event, "epoch": number, "step": 10 * (number + 1), "loss": loss, "acc1": 50.0, **rest}


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_replaces_the_epochs_after_its_start(tmp_path: Any) -> None:
    before = [
        start(0),
        epoch(0, 3.0),
        epoch(0, 3.1, "validate"),
        epoch(1, 2.0),
        epoch(1, 2.1, "validate"),
        epoch(2, 1.0),
    ]
    evaluation = {"event": "validate", "loss": 9.9, "acc1": 1.0}
    write_metrics(tmp_path, *before, start(10), epoch(1, 2.5), epoch(1, 2.6, "validate"), evaluation)
    train, validate = read_events(str(tmp_path))
    assert [(event["epoch"], event["loss"]) for event in train] == [(0, 3.0), (1, 2.5)]
    assert [(event["epoch"], event["loss"]) for event in validate] == [(0, 3.1), (1, 2.6)]


def test_a_run_that_starts_again_replaces_all_epochs(tmp_path: Any) -> None:
    write_metrics(tmp_path, start(0), epoch(0, 3.0), epoch(1, 2.0), start(0), epoch(0, 2.9))
    assert [event["loss"] for event in read_events(str(tmp_path))[0]] == [2.9]


def test_a_truncated_line_is_left_out(tmp_path: Any) -> None:
    write_metrics(tmp_path, start(0), epoch(0, 3.0))
    with open(str(tmp_path / "metrics.jsonl"), "a") as file:
        file.write(json.dumps(epoch(1, 2.0))[:30] + "\n" + json.dumps(epoch(1, 2.5)) + "\n")
    assert [event["loss"] for event in read_events(str(tmp_path))[0]] == [3.0, 2.5]


# --- curves -----------------------------------------------------------------------------------------------------------


@needs_matplotlib
def test_curves_show_each_value_at_its_epoch(tmp_path: Any) -> None:
    write_metrics(tmp_path, start(0), epoch(0, 3.0), epoch(1, None), epoch(2, 1.0), epoch(2, 1.5, "validate"))
    axes = draw_curves(*read_events(str(tmp_path))).axes
    assert [one.get_title(loc="left") for one in axes] == [panel.title for panel in PANELS]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes[0].lines}
    assert lines == {"training": [[1, 3.0], [3, 1.0]], "validation": [[3, 1.5]]}  # a loss that is not finite is a gap
    assert [len(one.lines) for one in axes] == [2, 2, 1, 1]
    assert all(one.get_ylim()[0] == 0 for one in axes[2:])


@needs_matplotlib
def test_curves_without_any_event_are_empty_diagrams() -> None:
    assert [len(axes.lines) for axes in draw_curves([], []).axes] == [0, 0, 0, 0]


@needs_matplotlib
def test_a_run_draws_its_curves(folder: str, tmp_path: Any) -> None:
    flags = ["--arch", "vgg11", "--image-size", 32, "-b", 8, "--epochs", 1]
    result = run_main(folder, *flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "curves.tmp.png").exists()


@needs_matplotlib
def test_curves_that_cannot_be_written_leave_the_old_file(tmp_path: Any, monkeypatch: Any) -> None:
    write_metrics(tmp_path, start(0), epoch(0, 3.0))
    save_curves(str(tmp_path))
    before = (tmp_path / "curves.png").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_curves(str(tmp_path))
    assert sorted(os.listdir(str(tmp_path))) == ["curves.png", "metrics.jsonl"]
    assert (tmp_path / "curves.png").read_bytes() == before


# --- the confusion matrix ---------------------------------------------------------------------------------------------


@needs_matplotlib
def test_the_confusion_matrix_has_a_row_per_actual_and_a_column_per_predicted_class() -> None:
    axes = draw_confusion(np.array([[5, 0, 2], [0, 7, 0], [1, 0, 0]]), ["cat", "dog", "$1 or $2"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", r"\$1 or \$2"]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0.5, 0.5): "5", (2.5, 0.5): "2", (1.5, 1.5): "7", (0.5, 2.5): "1"}
    titles = [square.get_gid() for square in axes.patches if square.get_gid()]
    assert len(titles) == 9
    assert titles[2] == "title:actual cat, predicted $1 or $2: 2"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("goldfish", "goldfish"),
        ("sixteen letters.", "sixteen letters."),
        ("seventeen letters", "seventeen lette…"),
        ("金鱼", "金鱼"),
        ("八个汉字正好合适", "八个汉字正好合适"),
        ("九个汉字就太长了点", "九个汉字就太长…"),
    ],
)
def test_long_class_names_are_shortened(name: str, expected: str) -> None:
    assert shorten(name) == expected
    assert text_width(shorten(name)) <= 16
