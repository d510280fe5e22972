# SPDX-License-Identifier: BSD-3-Clause
"""The evaluation page: one HTML file with its images and figures inside. The template is report.html."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import warnings
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any, Callable, Sequence

from engine.data.datasets import ImageDataset, ImageFolder
from engine.errors import ImageError, UsageError
from engine.records.curves import ACC1, LOSS, draw_confusion, draw_curves, read_events
from engine.records.metrics import Predictions, Totals

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_MATRIX_CLASSES = 25  # with more classes, the cells are too small
MAX_PAIRS = 25
MAX_MISTAKES = 24

# Figures are drawn in placeholder colors, which become colors of the page: these follow its light and dark mode.
TEXT, MUTED, CORRECT, WRONG = "#010101", "#010102", "#010103", "#010104"
CSS_COLORS = {TEXT: "currentColor", MUTED: "var(--muted)", CORRECT: "var(--correct)", WRONG: "var(--wrong)"}
STYLE: dict[Any, Any] = {  # matplotlib's rcParams
    "svg.fonttype": "none",  # text stays text, in the fonts of the page
    "font.sans-serif": ["DejaVu Sans"],
    "axes.prop_cycle": f"cycler(color=['{CORRECT}', '{WRONG}'])",
    **dict.fromkeys(["text.color", "axes.titlecolor"], TEXT),
    **dict.fromkeys(["axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"], MUTED),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right"], False),
}


def write_report(
    folder: str,
    dataset: ImageDataset,
    predictions: Predictions,
    totals: Totals,
    *,
    title: str,
    image_size: int,
    facts: dict[str, object],
    training_folder: str | None,
) -> str:
    """Write folder/index.html and return its path. Requires matplotlib.

    Args:
        dataset: the validation images.
        facts: flags and versions. `weights`, `data` and `hardware` make up the subtitle.
        training_folder: where metrics.jsonl and args.json of the training are; None for weights from elsewhere.

    Raises:
        UsageError: the page cannot be written.
    """
    labels, predicted, confidence = dataset.labels, predictions.predicted, predictions.confidence
    classes = [" ".join(name.encode("utf-8", "replace").decode().split()) for name in dataset.classes]
    evaluated = predicted >= 0
    confusion = count_confusion(labels[evaluated], predicted[evaluated], len(classes))
    mistakes = np.flatnonzero(evaluated & (predicted != labels))
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")]
    numbers = [
        (f"{totals.acc1:.2f}%", "Acc@1"),
        (f"{totals.acc5:.2f}%", "Acc@5"),
        (f"{totals.loss:.4f}", "loss"),
        (f"{len(mistakes):,}", f"wrong of {confusion.sum():,}"),
    ]
    with open(os.path.join(os.path.dirname(__file__), "page.html"), encoding="utf-8") as file:
        template = Template(file.read())
    page = template.substitute(
        title=escape(title),
        subtitle=escape(", ".join(str(facts[key]) for key in ("weights", "data", "hardware") if key in facts)),
        numbers="".join(f"<div><b>{number}</b>{name}</div>" for number, name in numbers),
        curves=curves_section(training_folder) if training_folder else "",
        mistakes=mistakes_section(dataset, classes, image_size, mistakes, predictions),
        confusion=confusion_section(confusion, classes),
        classes=class_table(confusion, classes),
        configuration=table("This evaluation", facts) + table("Flags of the training", read_flags(training_folder)),
    )
    path = os.path.join(folder, "index.html")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(page)
    except OSError as error:
        raise UsageError(f"--report {path}: {error.strerror}") from error
    return path


def count_confusion(actual: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the confusion matrix, int64 (classes, classes): a row per actual, a column per predicted class."""
    return np.bincount(actual * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def percent(part: float, total: float) -> str:
    """Format part/total as a percentage, or a dash if total is 0."""
    return f"{100 * part / total:.1f}%" if total else "–"


def curves_section(folder: str) -> str:
    """Return loss and accuracy over the epochs of the training, or nothing if the folder does not have its metrics."""
    try:
        train, validate = read_events(folder)
    except (OSError, KeyError):
        return ""
    if not train:
        return ""
    figures = [
        to_svg(f"{panel.title} per epoch", draw_curves, train, validate, [panel], (5.4, 3.1)) for panel in (LOSS, ACC1)
    ]
    return f'<h2>Training</h2><div class="columns">{"".join(figures)}</div>'


def read_flags(folder: str | None) -> dict[str, object]:
    """Return the flags of the training from its args.json; none if the folder has none."""
    if folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError), open(os.path.join(folder, "args.json")) as file:
            return json.load(file)["flags"]
    return {}


def table(title: str, values: dict[str, object]) -> str:
    """Return a table that is folded up until its title is clicked; nothing if no value is set."""
    rows = [
        f'<tr><td>{escape(key)}</td><td class="name">{escape(str(value))}</td></tr>'
        for key, value in values.items()
        if value is not None and value is not False
    ]
    return f"<details><summary>{title}</summary><table>{''.join(rows)}</table></details>" if rows else ""


def mistakes_section(
    dataset: ImageDataset, classes: Sequence[str], size: int, mistakes: np.ndarray, predictions: Predictions
) -> str:
    """Return the images of the most confident mistakes, as the model sees them. `mistakes`: sorted indices."""
    figures: list[str] = []
    image_format = "png" if size <= 64 else "jpeg"
    for index in mistakes.tolist():
        if len(figures) == MAX_MISTAKES:
            break
        try:
            image = dataset.validation_image(index, size)
        except ImageError:  # it was readable during the evaluation
            continue
        content = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(content, image_format, quality=88)
        data = base64.b64encode(content.getvalue()).decode()
        predicted, actual = classes[predictions.predicted[index]], classes[dataset.labels[index]]
        name = os.path.basename(dataset.path(index)) if isinstance(dataset, ImageFolder) else f"image {index}"
        figures.append(
            f'<figure><img alt="" src="data:image/{image_format};base64,{data}">'
            f"predicted <i>{escape(predicted)}</i> ({percent(predictions.confidence[index], 1)})<br>"
            f"actual <b>{escape(actual)}</b><small>{escape(name)}</small></figure>"
        )
    if not figures:
        return "<p>None.</p>"
    style = "images pixelated" if image_format == "png" else "images"
    count = f"{len(figures)} of {len(mistakes):,}, at the model's input size."
    return f'<p>{count}</p><div class="{style}">{"".join(figures)}</div>'


def confusion_section(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Return the confusion matrix, if its cells are large enough, and the pairs of classes confused most often."""
    errors = confusion - np.diag(np.diag(confusion))
    rows = []
    for cell in np.argsort(-errors, axis=None, kind="stable")[:MAX_PAIRS].tolist():
        actual, predicted = divmod(cell, len(classes))
        count = errors[actual, predicted]
        if count:
            rows.append(
                f'<tr><td>{escape(classes[actual])}</td><td class="name">{escape(classes[predicted])}</td>'
                f"<td>{count:,}</td><td>{percent(count, confusion[actual].sum())}</td></tr>"
            )
    pairs = "<h2>Most confused pairs</h2>" + (
        '<div class="scroll"><table><thead><tr><th>Actual</th><th class="name">Predicted</th><th>Images</th>'
        f"<th>Share of class</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        if rows
        else "<p>None.</p>"
    )
    if len(classes) > MAX_MATRIX_CLASSES:
        return pairs
    matrix = to_svg("Confusion matrix", draw_confusion, confusion, classes)
    return f'<div class="columns"><div><h2>Confusion matrix</h2>{matrix}</div><div>{pairs}</div></div>'


def class_table(confusion: np.ndarray, classes: Sequence[str]) -> str:
    """Return a table with a row per class, sorted by recall, worst first; with a filter if there are many classes."""
    images, predicted, correct = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    recall, precision = correct / np.maximum(images, 1), correct / np.maximum(predicted, 1)
    rows = []
    for index in np.lexsort((-images, recall)).tolist():
        others = confusion[index].copy()
        others[index] = 0
        most = int(others.argmax())
        rows.append(
            f'<tr><td>{escape(classes[index])}</td><td data-value="{images[index]}">{images[index]:,}</td>'
            f'<td data-value="{recall[index]:.6f}"><span class="bar" style="--share:{100 * recall[index]:.0f}%"></span>'
            f"{percent(correct[index], images[index])}</td>"
            f'<td class="wide" data-value="{precision[index]:.6f}">{percent(correct[index], predicted[index])}</td>'
            f'<td class="name">{escape(f"{classes[most]} ({others[most]:,})") if others[most] else ""}</td></tr>'
        )
    search = '<input id="filter" type="search" placeholder="Filter classes" aria-label="Filter classes">'
    return (
        f'{search if len(classes) > 20 else ""}<div class="scroll" id="classes"><table><thead><tr>'
        "<th><button>Class</button></th><th><button>Images</button></th>"
        '<th aria-sort="ascending"><button>Recall</button></th><th class="wide"><button>Precision</button></th>'
        '<th class="name"><button>Most confused with</button></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def to_svg(label: str, draw: Callable[..., Figure], *args: object) -> str:
    """Return the figure draw(*args) as an SVG element for an HTML page. The same figure gives the same text."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the fonts
        draw(*args).savefig(content, format="svg", transparent=True)
    size, body = re.findall(r'viewBox="0 0 (.*?)".*?>(.*)', content.getvalue(), flags=re.DOTALL)[0]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="title:(.*?)">', r"<g><title>\1</title>", body)  # a tooltip for each cell
    body = re.sub(r'<g id=".*?"', "<g", body).replace("xlink:href", "href")  # the other ids are the same in each figure
    for color, css_color in CSS_COLORS.items():
        body = body.replace(color, css_color)
    width = 1.35 * float(size.split()[0])
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="{label}" style="max-width: {width:.0f}px">{body}'
