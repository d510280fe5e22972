# SPDX-License-Identifier: BSD-3-Clause
"""Make the figures of the documentation.

    python tools/docs_figures.py quickstart test/output/quickstart docs

draws quickstart.png from the output of test/quickstart.sh: its curves, and its predictions for validation digits,
errors in red.

    python tools/docs_figures.py programs docs/results.md docs

draws programs.png from the table of programs in docs/results.md.

    pip download --no-deps scikit-image==0.26.0
    unzip scikit_image-*.whl "skimage/data/*"
    python tools/docs_figures.py photos skimage/data docs

trains on crops of ten images (data/README.md), for two minutes of one CPU core. It writes heatmap.png (predict.py
--heatmap) and, if a Chromium is installed, report.png (a screenshot of the evaluation page).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.checkpoints import load_model
from engine.data.datasets import read_digits

import numpy as np
import torch
from PIL import Image

REPOSITORY = sys.path[0]
ROWS, COLUMNS = 4, 8
PHOTOS = {  # class: file of scikit-image 0.26.0; data/README.md has the credits
    "astronaut": "astronaut.png",
    "bricks": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
COMMANDS = [
    "main.py photos --amp --image-size 96 -b 16 --epochs 6 --crop-scale 0.5 1 --output-dir run",
    "main.py photos -e --resume run/model_best.pth.tar --report page --output-dir run",
    "predict.py camera.png cat.png coffee.png --checkpoint run/model_best.pth.tar --heatmap heatmap.png",
]
BLUE, ORANGE, RED = "#3b82c4", "#d0651f", "#be2d5f"  # training, validation, wrong: as in curves.png and on the page


def style(axis: Any, title: str, xlabel: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(xlabel, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def draw_quickstart(folder: str, path: str) -> None:
    """Draw loss and accuracy over the epochs, and the predictions for the first validation digits."""
    from matplotlib.figure import Figure

    dataset = read_digits(training=False)
    model = load_model(os.path.join(folder, "model_best.pth.tar"))
    images = torch.from_numpy(dataset.images[: ROWS * COLUMNS]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = model.network((images - model.preprocessing.mean[0]) / model.preprocessing.std[0])
    confidence, predicted = logits.softmax(1).max(1)

    figure = Figure(figsize=(11, 3.5), constrained_layout=True)
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=[1.25, 1]))
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        events = [json.loads(line) for line in file]
    train, validation = ([event for event in events if event["event"] == kind] for kind in ("epoch", "validate"))
    validation = [event for event in validation if "epoch" in event]  # not that of -e
    for axis, key, title in zip(left.subplots(1, 2), ("loss", "acc1"), ("Loss", "Acc@1 (%)")):
        for records, label, color in ((train, "training", BLUE), (validation, "validation", ORANGE)):
            epochs = [record["epoch"] for record in records]
            axis.plot(epochs, [record[key] for record in records], marker="o", markersize=3.5, label=label, color=color)
        style(axis, title, "epoch")
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


def read_programs(path: str) -> list[tuple[str, float, list[float]]]:
    """Return (program, minutes per epoch, accuracy after each epoch in percent) of each row in docs/results.md."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file.read().partition("| program | epochs |")[2].split("\n\n")[0].splitlines()[2:]:
            name, _, _, minutes, accuracies = (cell.strip() for cell in line.strip("|").split("|"))
            rows.append((name, float(minutes), [float(value) for value in accuracies.replace("*", "").split()]))
    return rows


def draw_programs(source: str, path: str) -> None:
    """Draw the accuracy over the minutes of each training. A program has one color, and its name at its last row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), constrained_layout=True)
    axis = figure.subplots()
    rows = read_programs(source)
    names = list(dict.fromkeys(name for name, *_ in rows))
    colors = dict(zip(names, (ORANGE, BLUE, "#3a8f5c", "#7a5aa8", "#707070")))
    for row, (name, minutes, accuracies) in enumerate(rows, 1):
        times, color = [minutes * epoch for epoch in range(1, len(accuracies) + 1)], colors[name]
        axis.plot(times, accuracies, marker="o", markersize=3.5, color=color)
        if name not in [later for later, *_ in rows[row:]]:
            end = (times[-1], accuracies[-1])
            axis.annotate(name, end, (6, 0), textcoords="offset points", va="center", color=color)
    style(axis, "CIFAR-10, JPEG copies: Acc@1 (%)", "minutes of training")
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.set_ylim(top=100)
    figure.savefig(path, dpi=110)


def write_crops(source: str, folder: str) -> None:
    """Write square crops of each image: of its lower right for validation, of the rest for training."""
    generator = random.Random(0)
    for name, file in PHOTOS.items():
        photo = Image.open(os.path.join(source, file)).convert("RGB")
        width, height = photo.size
        x, y = width * 2 // 5, height * 3 // 5
        training, validation = [(0, 0, width, y), (0, 0, x, height)], [(x, y, width, height)]
        for part, areas, count in (("train", training, 40), ("val", validation, 10)):
            os.makedirs(os.path.join(folder, part, name))
            for number in range(count):
                left, top, right, bottom = areas[number % len(areas)]
                side = round(generator.uniform(0.6, 1) * min(right - left, bottom - top))
                left, top = generator.randint(left, right - side), generator.randint(top, bottom - side)
                crop = photo.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.LANCZOS)
                crop.save(os.path.join(folder, part, name, f"{number:02}.png"))


def draw_photos(source: str, folder: str) -> None:
    """Train on the crops. Draw the evaluation page, and the heatmaps of three photographs."""
    folder = os.path.abspath(folder)
    with tempfile.TemporaryDirectory() as scratch:
        write_crops(source, os.path.join(scratch, "photos"))
        for name, file in PHOTOS.items():
            Image.open(os.path.join(source, file)).save(os.path.join(scratch, f"{name}.png"))
        for command in COMMANDS:
            program, *flags = command.split()
            subprocess.run([sys.executable, os.path.join(REPOSITORY, program), *flags], cwd=scratch, check=True)
        shutil.copy(os.path.join(scratch, "heatmap.png"), folder)
        capture_page(scratch, os.path.join(folder, "report.png"))


def capture_page(folder: str, path: str) -> None:
    """Take a screenshot of the evaluation page in headless Chromium, if that is installed."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"{path}: not made, no Chromium is installed")
        return
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars"
    )
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                browser,
                *options.split(),
                f"--user-data-dir={profile}",
                "--window-size=1100,1430",
                f"--screenshot={os.path.abspath(path)}",
                f"file://{os.path.abspath(folder)}/page/index.html",
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
    Image.open(path).convert("RGB").quantize(kmeans=3).save(path)  # 256 colors, for a small file


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("quickstart", "programs", "photos"):
        sys.exit(__doc__)
    if sys.argv[1] == "quickstart":
        draw_quickstart(sys.argv[2], os.path.join(sys.argv[3], "quickstart.png"))
    elif sys.argv[1] == "programs":
        draw_programs(sys.argv[2], os.path.join(sys.argv[3], "programs.png"))
    else:
        draw_photos(sys.argv[2], sys.argv[3])
