# SPDX-License-Identifier: BSD-3-Clause
"""The curves drawn from metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import os
from typing import Any

from engine.records import curves
from engine.records.curves import LOSS, PANELS, ceiling, draw_curves, read_events, save_curves, svg_curves

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
    assert lines == {"training": [[0, 3.0], [2, 1.0]], "validation": [[2, 1.5]]}  # a loss that is not finite is a gap
    assert [len(one.lines) for one in axes] == [2, 2, 1, 1]
    assert all(one.get_ylim()[0] == 0 for one in axes[2:])


@needs_matplotlib
def test_curves_without_any_event_are_empty_diagrams() -> None:
    assert [len(axes.lines) for axes in draw_curves([], []).axes] == [0, 0, 0, 0]


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


@needs_matplotlib
@pytest.mark.parametrize("kind", ["epoch", "validate"])
@pytest.mark.parametrize("outlier, at", [(4242.0, 15), (40.0, 0), (1e30, 29)])
def test_an_outlier_does_not_flatten_the_losses_and_is_marked(kind: str, outlier: float, at: int) -> None:
    train = [epoch(number, 2.3 * 0.9**number) for number in range(30)]
    validate = [epoch(number, 2.5 * 0.9**number + 0.1, "validate") for number in range(30)]
    (train if kind == "epoch" else validate)[at]["loss"] = outlier
    (axes,) = draw_curves(train, validate, [LOSS]).axes
    assert 2.0 < axes.get_ylim()[1] < 3.0
    marks = [mark for collection in axes.collections for mark in collection.get_offsets().tolist()]
    assert marks == [[at, 1.0]]
    assert f"{outlier:,.4g}" in axes.get_title(loc="right")


@needs_matplotlib
def test_losses_without_an_outlier_are_shown_whole() -> None:
    """The first epoch of a training is not an outlier, however fast the loss falls."""
    (axes,) = draw_curves([epoch(number, 2.3 * 0.5**number) for number in range(30)], [], [LOSS]).axes
    assert axes.get_ylim()[1] > 2.3
    assert not axes.collections and not axes.get_title(loc="right")


@pytest.mark.parametrize(
    "values, expected",
    [
        ([], 0.0),
        ([2.0], 2.0),
        ([2.0, 100.0], 2.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([2.3, 0.3, 0.2], 2.3),
        ([9.0, 1, 1, 70], 9.0),
    ],
)
def test_the_ceiling_of_a_few_losses(values: list[float], expected: float) -> None:
    assert ceiling(values) == expected


@needs_matplotlib
def test_curves_of_a_page_are_the_same_files_each_time_and_none_without_metrics(tmp_path: Any) -> None:
    assert svg_curves(str(tmp_path), "#888888") == []
    write_metrics(tmp_path, start(0), epoch(0, 3.0), epoch(0, 3.1, "validate"))
    figures = svg_curves(str(tmp_path), "#888888")
    assert [title for title, _ in figures] == ["Loss by epoch", "Acc@1 (%) by epoch"]
    assert all(b"#888888" in content for _, content in figures)
    assert svg_curves(str(tmp_path), "#888888") == figures
