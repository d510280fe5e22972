# SPDX-License-Identifier: BSD-3-Clause
"""The training curves in metrics.jsonl, drawn with matplotlib (optional)."""

from __future__ import annotations

import contextlib
import io
import json
import os
from typing import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"training": "#3b82c4", "validation": "#d0651f"}  # on a white and on a dark page


class Panel(NamedTuple):
    """One diagram of a figure: the value `key` of each epoch, from training and, if `validated`, from validation."""

    title: str
    key: str
    validated: bool = False


LOSS = Panel("Loss", "loss", validated=True)
ACC1 = Panel("Acc@1 (%)", "acc1", validated=True)
PANELS = (LOSS, ACC1, Panel("Learning rate", "lr"), Panel("Throughput (images/s)", "images_per_second"))


def read_events(folder: str) -> tuple[list[dict], list[dict]]:
    """Return the `epoch` and the `validate` events of folder/metrics.jsonl, in the order of epochs.

    A run that resumes at a step replaces the events that an earlier run wrote after that step. Those of an evaluation
    (-e) have no epoch and are left out.

    Raises:
        OSError: the file cannot be read.
    """
    events: dict[str, list[dict]] = {"epoch": [], "validate": []}
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # truncated when the process was killed
                record = json.loads(line)
                kind, step = record["event"], record.get("step")
                if kind == "start":
                    events = {name: [event for event in events[name] if event["step"] <= step] for name in events}
                elif kind in events and "epoch" in record:
                    events[kind].append(record)
    return events["epoch"], events["validate"]


def draw_curves(
    train: list[dict],
    validate: list[dict],
    panels: Sequence[Panel] = PANELS,
    panel_size: tuple[float, float] = (5.0, 3.2),
) -> Figure:
    """Draw one diagram per panel over the epochs, which count from 0 as in the log, at most two in a row.

    The colors of text and axes come from matplotlib's rcParams.

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
        points = {
            label: _points(events, panel.key) for label, events in (("training", train), ("validation", validate))
        }
        for label in points:
            if points[label]:
                axes.plot(*zip(*points[label]), marker="o", markersize=3, label=label, color=COLORS[label])
        axes.set_title(panel.title, loc="left", fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if not panel.validated:
            axes.set_ylim(0, 1.1 * max([value for _, value in points["training"]], default=0) or 1)
        elif axes.lines:
            axes.legend(frameon=False)
        if panel is LOSS:
            _clip(axes, points)
    return figure


def _points(events: list[dict], key: str) -> list[tuple[int, float]]:
    """Return (epoch, value) of each event; a value that is not finite, None, is a gap."""
    return [(event["epoch"], event[key]) for event in events if event.get(key) is not None]


def ceiling(values: Sequence[float]) -> float:
    """Return the largest of the losses that a diagram shows; of nine in ten it shows at least a third of the height.

    values: the first is that of the first epoch, which is large without being an outlier.
    """
    most = max(sorted(values)[: -max(1, len(values) // 10)], default=0.0)
    if most and values[0] <= 10 * most:
        most = max(most, values[0])
    return max([value for value in values if value <= 3 * most], default=0.0) or max(values, default=0.0)


def _clip(axes: Axes, points: dict[str, list[tuple[int, float]]]) -> None:
    """Show the losses up to their ceiling, and a triangle at the upper edge for each one above it."""
    values = [value for label in points for _, value in points[label]]
    top = ceiling(values)
    if top == max(values, default=top):
        return
    margin = 0.05 * (top - min(values)) or 0.05 * top
    axes.set_ylim(min(values) - margin, top + margin)
    axes.set_title(f"▲ beyond the axis, up to {max(values):,.4g}", loc="right", fontsize="small")
    edge = axes.get_xaxis_transform()  # epochs, and the share of the height
    for label in points:
        above = [epoch for epoch, value in points[label] if value > top]
        axes.scatter(
            above, [1.0] * len(above), marker="^", color=COLORS[label], transform=edge, clip_on=False, zorder=3
        )


def svg_curves(folder: str, color: str) -> list[tuple[str, bytes]]:
    """Return (title, SVG file) of loss and accuracy of the training in a folder; nothing if its metrics are not there.

    color: of text and axes; the background is transparent. The same curves give the same files. Raises ImportError if
    matplotlib is not installed.
    """
    import matplotlib

    figures = []
    with contextlib.suppress(OSError, KeyError):
        train, validate = read_events(folder)
        keys = ["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"]
        for panel in (LOSS, ACC1) if train else ():
            content = io.BytesIO()
            with matplotlib.rc_context({**dict.fromkeys(keys, color), "svg.hashsalt": panel.title}):  # type: ignore
                figure = draw_curves(train, validate, [panel], (4.6, 2.8))
                figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
            figures.append((f"{panel.title} by epoch", content.getvalue()))
    return figures


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
