# SPDX-License-Identifier: BSD-3-Clause
"""Figures drawn with matplotlib (optional): the training curves in metrics.jsonl, the confusion matrix."""

from __future__ import annotations

import contextlib
import json
import os
import unicodedata
from typing import TYPE_CHECKING, Any, NamedTuple, Sequence

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LABEL_WIDTH = 16  # of a class name beside the confusion matrix, in Latin letters


class Panel(NamedTuple):
    """One diagram of a figure: the value `key` of each epoch, from training and, if `validated`, from validation."""

    title: str
    key: str
    validated: bool = False


LOSS = Panel("Loss", "loss", validated=True)
ACC1 = Panel("Acc@1 (%)", "acc1", validated=True)
PANELS = (LOSS, ACC1, Panel("Learning rate", "lr"), Panel("Throughput (images/s)", "images_per_second"))


def read_events(folder: str) -> tuple[list[dict], list[dict]]:
    """Return the `epoch` and the `validate` events of folder/metrics.jsonl, each sorted by epoch.

    A run that resumes at a step replaces the events that an earlier run wrote after that step. Those of an evaluation
    (-e) have no epoch and are left out.

    Raises:
        OSError: the file cannot be read.
    """
    train: dict[int, dict] = {}
    validate: dict[int, dict] = {}
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # truncated when the process was killed
                continue
            if record["event"] == "start":
                for events in (train, validate):
                    for epoch in [epoch for epoch, event in events.items() if event["step"] > record["step"]]:
                        del events[epoch]
            elif record["event"] == "epoch":
                train[record["epoch"]] = record
            elif record["event"] == "validate" and "epoch" in record:
                validate[record["epoch"]] = record
    return [train[epoch] for epoch in sorted(train)], [validate[epoch] for epoch in sorted(validate)]


def draw_curves(
    train: list[dict],
    validate: list[dict],
    panels: Sequence[Panel] = PANELS,
    panel_size: tuple[float, float] = (5.0, 3.2),
) -> Figure:
    """Draw one diagram per panel over the epochs, at most two in a row.

    Colors and fonts come from matplotlib's rcParams.

    Args:
        train, validate: events as `read_events` returns them.
        panel_size: width and height of one diagram in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    # Figure, not pyplot: no window, no global state, nothing to close.
    figure = Figure(figsize=(panel_size[0] * columns, panel_size[1] * rows), constrained_layout=True)
    for panel, axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat):
        series = [("training", "C0", train)] + [("validation", "C1", validate)] * panel.validated
        for label, color, events in series:
            points = [(event["epoch"] + 1, event[panel.key]) for event in events if event.get(panel.key) is not None]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3, label=label, color=color)
        axes.set_title(panel.title, loc="left", fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if panel.validated:
            if axes.lines:
                axes.legend(frameon=False)
        else:
            axes.set_ylim(0, 1.1 * max([value for _, value in points], default=0) or 1)
    return figure


def save_curves(folder: str) -> None:
    """Draw folder/curves.png from folder/metrics.jsonl. The file is replaced atomically.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be read or written.
    """
    temporary = os.path.join(folder, "curves.tmp.png")
    try:
        draw_curves(*read_events(folder)).savefig(temporary, dpi=110)
        os.replace(temporary, os.path.join(folder, "curves.png"))
    finally:
        with contextlib.suppress(FileNotFoundError):  # it exists only after an error, such as a full disk
            os.remove(temporary)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw the confusion matrix: a row per actual, a column per predicted class, the color by the share of the row.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    # The margins are computed here, in points: without a Chinese font, matplotlib measures Chinese names wrong.
    count = len(classes)
    names = [shorten(name) for name in classes]
    cell, label = min(44.0, 340 / count), 6.0 * max(text_width(name) for name in names)
    left, top, right = label + 26, 38.0, 0.0
    rotation: dict[str, Any] = {}
    if label > cell:
        top, right = 32 + 0.85 * label, max(0.0, 0.6 * label - cell / 2)
        rotation = {"rotation": 55, "ha": "left", "rotation_mode": "anchor"}
    width, height = left + cell * count + right, top + cell * count
    figure = Figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((left / width, 0, cell * count / width, cell * count / height), frame_on=False)
    axes.set(xlim=(0, count), ylim=(count, 0), xticks=np.arange(count) + 0.5, yticks=np.arange(count) + 0.5)
    axes.tick_params(length=0, pad=6, labeltop=True, labelbottom=False)
    axes.set_xticklabels(names, **rotation)
    axes.set_yticklabels(names)
    figure.text(left / width, 1 - 12 / height, "Predicted", weight="bold")
    figure.text(12 / width, 1 - top / height, "Actual", weight="bold", rotation=90, ha="right", rotation_mode="anchor")
    for (actual, predicted), images in np.ndenumerate(confusion):
        share = images / max(1, confusion[actual].sum())
        color, alpha = ("C0", 0.15 + 0.5 * share) if actual == predicted else ("C1", 0.2 + 0.55 * share**0.5)
        square = Rectangle((predicted + 0.03, actual + 0.03), 0.94, 0.94, linewidth=0)
        square.set(facecolor=color if images else "gray", alpha=alpha if images else 0.1)
        square.set_gid(f"title:actual {classes[actual]}, predicted {classes[predicted]}: {images}")
        axes.add_patch(square)
        size = min(10.0, 1.5 * cell / len(str(images)))
        if images and size >= 6:
            position = predicted + 0.5, actual + 0.5
            axes.text(*position, str(images), size=size, ha="center", va="center_baseline")
    return figure


def text_width(text: str) -> int:
    """Return the width in Latin letters: a Chinese character is as wide as two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "FW" else 1 for letter in text)


def shorten(name: str) -> str:
    """Return a class name that fits beside the confusion matrix."""
    short = name
    while text_width(short) > MAX_LABEL_WIDTH:
        short = short[:-2] + "…" if short.endswith("…") else short[:-1] + "…"
    return short.replace("$", r"\$")  # matplotlib reads what is between two $ as a formula
