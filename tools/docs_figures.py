# SPDX-License-Identifier: BSD-3-Clause
"""Make the figures of the documentation from the output of test/quickstart.sh.

    python tools/docs_figures.py test/output/quickstart docs

Writes quickstart.png (its curves, and its predictions for validation digits, errors in red), heatmap.png (predict.py
--heatmap) and, if a Chromium is installed, report.png (a screenshot of its evaluation page).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.checkpoints import load_model
from engine.data.datasets import read_digits

import predict

import numpy as np
import torch
from PIL import Image

ROWS, COLUMNS = 4, 8
BLUE, ORANGE, RED = "#3b82c4", "#d0651f", "#be2d5f"  # training, validation, wrong: as in curves.png and on the page


def draw_quickstart(folder: str, path: str) -> None:
    """Draw loss and accuracy over the epochs, and the predictions for the first validation digits."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dataset = read_digits(training=False)
    model = load_model(os.path.join(folder, "model_best.pth.tar"))
    images = torch.from_numpy(dataset.images[: ROWS * COLUMNS]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = model.network((images - model.preprocessing.mean[0]) / model.preprocessing.std[0])
    confidence, predicted = logits.softmax(1).max(1)

    figure = Figure(figsize=(11, 3.5), constrained_layout=True)
    FigureCanvasAgg(figure)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[1.25, 1]))
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        events = [json.loads(line) for line in file]
    train, validation = ([event for event in events if event["event"] == kind] for kind in ("epoch", "validate"))
    validation = [event for event in validation if "epoch" in event]  # not that of -e
    for axis, key, title in zip(left.subplots(1, 2), ("loss", "acc1"), ("Loss", "Acc@1 (%)")):
        for records, label, color in ((train, "training", BLUE), (validation, "validation", ORANGE)):
            epochs = [record["epoch"] for record in records]
            axis.plot(epochs, [record[key] for record in records], marker="o", markersize=3.5, label=label, color=color)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("epoch", fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        if key == "acc1":
            axis.legend(frameon=False, fontsize=9, loc="lower right")
            last = validation[-1]
            position, offset = (last["epoch"], last[key]), (0, -14)
            axis.annotate(
                f"{last[key]:.2f}%", position, offset, textcoords="offset points", ha="center", fontsize=9, color=ORANGE
            )
    for index, axis in enumerate(right.subplots(ROWS, COLUMNS).flat):
        axis.imshow(dataset.images[index])
        axis.axis("off")
        name, correct = model.classes[int(predicted[index])], int(predicted[index]) == dataset.labels[index]
        color = "#1b1f24" if correct else RED
        axis.set_title(f"{name}  {float(confidence[index]):.0%}", fontsize=8, pad=2, color=color)
    figure.savefig(path, dpi=110)


def draw_heatmap(folder: str, path: str) -> None:
    """Draw the heatmaps of three validation digits."""
    dataset = read_digits(training=False)
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for index in (0, 3, 8):
            files.append(os.path.join(scratch, f"digit {dataset.labels[index]}.png"))
            Image.fromarray(dataset.images[index]).save(files[-1])
        checkpoint = os.path.join(folder, "model_best.pth.tar")
        predict.main([*files, "--checkpoint", checkpoint, "--heatmap", path, "--device", "cpu"])


def capture_page(folder: str, path: str) -> None:
    """Take a screenshot of the evaluation page in headless Chromium, if that is installed."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"{path}: not made, no Chromium is installed")
        return
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                *options.split(),
                f"--user-data-dir={profile}",
                "--window-size=1100,1500",
                f"--screenshot={os.path.abspath(path)}",
                f"file://{os.path.abspath(folder)}/page/index.html",
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw_quickstart(sys.argv[1], os.path.join(sys.argv[2], "quickstart.png"))
    draw_heatmap(sys.argv[1], os.path.join(sys.argv[2], "heatmap.png"))
    capture_page(sys.argv[1], os.path.join(sys.argv[2], "report.png"))
