# SPDX-License-Identifier: BSD-3-Clause
"""Classify images: top-5 predictions for each, with the weights of a checkpoint.

    python predict.py dog.jpg --checkpoint model_best.pth.tar
    python predict.py holiday/ --checkpoint vgg16.pth --classes imagenet_classes.txt --csv > holiday.csv
    python predict.py dog.jpg --checkpoint model_best.pth.tar --heatmap dog_heatmap.png

Accepts every checkpoint that main.py reads. If it holds EMA weights (--ema-decay), they are used.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Sequence

import vgg
from engine import device
from engine.accelerator import Accelerator
from engine.cli import OneLineParser
from engine.errors import EXIT_USAGE, ImageError, UsageError, run_script
from engine.flags import DEVICE_HELP, DEVICES
from engine.folder_index import EXTENSIONS
from engine.inference import CLASSES_HELP, Model, load_model
from engine.logger import Logger
from engine.transforms import printable, read_rgb, reason_of, resize, resize_center_crop

import numpy as np
import torch
import torch.nn.functional as F

BATCH = 32  # images
TOP_K = 5
MAX_HEATMAPS = 24
CJK_FONTS = [
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
]


class Prediction(NamedTuple):
    name: str  # of the class
    probability: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser("predict.py", (__doc__ or "").splitlines()[0])
    parser.add_argument("images", metavar="IMAGE|DIR", nargs="+", help="images, or folders of images")
    parser.add_argument("--checkpoint", metavar="FILE", required=True, help="main.py's, ModelZoo's or torchvision's")
    parser.add_argument("--classes", metavar="FILE", help=CLASSES_HELP)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per image: image, predictions")
    output.add_argument("--csv", action="store_true", help="print image,rank,class,probability")
    parser.add_argument("--heatmap", metavar="OUT.png", help="draw what each top prediction is based on (Grad-CAM)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help=DEVICE_HELP)
    return parser.parse_args(argv)


def find_images(paths: Sequence[str]) -> list[str]:
    """Return the files among the paths, and the images in the folders among them, in order."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
        images = sorted(file for file in files if file.lower().endswith(EXTENSIONS))
        if not images:
            raise UsageError(f"{path}: no images in it ({' '.join(EXTENSIONS)})")
        found += images
    return found


def read_image(path: str, model: Model) -> np.ndarray | ImageError:
    """Return (S, S, 3) uint8, prepared exactly as for validation, or the error."""
    try:
        image = read_rgb(path)
        if model.center_crop:
            return resize_center_crop(image, model.image_size)
        return resize(np.asarray(image), model.image_size)
    except Exception as error:  # Pillow raises nearly any type for a corrupt file
        return ImageError(f"{printable(path)}: cannot be read as an image ({reason_of(error)})")


def grad_cam(network: vgg.VGG, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (heatmaps (N, h, w) in [0, 1], logits (N, classes)); a heatmap shows what the top prediction is based on.

    images: (N, 3, S, S), normalized. h and w are those of the last convolution's maps. Selvaraju et al.,
    arXiv:1610.02391, section 3.
    """
    with torch.no_grad():
        maps = F.relu(network.features[:-2](images))  # the last two are max-pool and ReLU, which commute
    with torch.enable_grad():
        logits = network.classify(network.features[-2](maps.requires_grad_()))
        (gradients,) = torch.autograd.grad(logits.max(1)[0].sum(), maps)
    heat = F.relu((gradients.mean((2, 3), keepdim=True) * maps.detach()).sum(1))
    return heat / heat.flatten(1).max(1)[0].clamp(min=1e-12).view(-1, 1, 1), logits.detach()


class HeatmapRow(NamedTuple):
    path: str
    image: np.ndarray  # (S, S, 3) uint8
    heat: torch.Tensor  # (h, w), on the CPU
    predictions: list[Prediction]


def draw_heatmaps(rows: list[HeatmapRow], path: str) -> None:
    """Draw image, heatmap and predictions, one row per image. Raises UsageError if the file cannot be written."""
    from matplotlib import cm, font_manager, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans"] + [name for name in CJK_FONTS if name in installed]
    with rc_context({"font.family": fonts}):
        figure = Figure(figsize=(9.6, 2.9 * len(rows)), constrained_layout=True)
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1.2]})
        for (left, middle, right), row in zip(axes, rows):
            size = len(row.image)
            left.imshow(row.image)
            left.set_title(os.path.basename(row.path)[-32:], loc="left", fontsize=9)
            middle.imshow(row.image)
            smooth = F.interpolate(row.heat[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
            overlay = cm.jet(smooth.numpy())  # type: ignore[attr-defined]
            overlay[..., 3] = 0.55 * smooth.numpy() ** 0.5  # parts that do not matter stay as they are
            middle.imshow(overlay)
            middle.set_title(f"based on: {row.predictions[0].name}"[:40], loc="left", fontsize=9)
            bars = right.barh(
                range(len(row.predictions)), [p.probability for p in row.predictions], color="#4c78a8", height=0.5
            )
            for bar, (name, probability) in zip(bars, row.predictions):
                right.text(0, bar.get_y() - 0.08, f"{name[:34]}  {probability:.1%}", fontsize=8, va="bottom")
            right.set_xlim(0, 1)
            right.set_ylim(len(row.predictions) - 0.4, -0.9)
            for axis in (left, middle, right):
                axis.axis("off")
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise UsageError(f"--heatmap {path}: {error}") from error


def format_predictions(path: str, predictions: list[Prediction], *, as_json: bool, as_csv: bool) -> str:
    """Return the output for one image."""
    if as_json:
        items = [{"class": name, "probability": probability} for name, probability in predictions]
        return json.dumps({"image": path, "predictions": items}, ensure_ascii=False)
    if as_csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([path, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(predictions, 1))
        return text.getvalue().rstrip("\n")
    return "\n".join([path] + [f"  {rank}  {100 * p:6.2f}%  {name}" for rank, (name, p) in enumerate(predictions, 1)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions for every image. Returns 2 if some could not be read, else 0. Raises UserError."""
    args = parse_args(argv)
    paths = find_images(args.images)
    if args.heatmap and len(paths) > MAX_HEATMAPS:
        raise UsageError(f"--heatmap: at most {MAX_HEATMAPS} images, got {len(paths)}")
    if args.heatmap and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--heatmap requires matplotlib: pip install matplotlib")
    accelerator = Accelerator(device.resolve_device("gpu" if args.device == "cuda" else args.device)[0])
    model = load_model(args.checkpoint, args.classes)
    accelerator.place(model.network.requires_grad_(False))
    normalize = accelerator.normalizer(model.mean, model.std)
    logger, code = Logger(prints=True, writes=False), 0
    rows: list[HeatmapRow] = []
    if args.csv:
        logger.line("image,rank,class,probability")
    with ThreadPoolExecutor() as pool, torch.no_grad(), logger.progress(len(paths), 0, "Images"):
        for first in range(0, len(paths), BATCH):
            batch = paths[first : first + BATCH]
            images: list[Any] = []
            for path, image in zip(batch, pool.map(lambda path: read_image(path, model), batch)):
                if isinstance(image, ImageError):
                    print(f"predict.py: error: {image}", file=sys.stderr)
                    code = EXIT_USAGE
                else:
                    images.append((path, image))
            if images:
                pixels = normalize(torch.from_numpy(np.stack([image for _, image in images])))
                if args.heatmap:
                    heat, logits = grad_cam(model.network, pixels)
                else:
                    logits = model.network(pixels)
                top = logits.softmax(1).topk(min(TOP_K, len(model.classes)))
                for position, (path, image) in enumerate(images):
                    values, indices = top[0][position].tolist(), top[1][position].tolist()
                    predictions = [Prediction(model.classes[i], value) for value, i in zip(values, indices)]
                    logger.line(format_predictions(path, predictions, as_json=args.json, as_csv=args.csv))
                    if args.heatmap:
                        rows.append(HeatmapRow(path, image, heat[position].cpu(), predictions))
            logger.advance(len(batch))
    if rows:
        draw_heatmaps(rows, args.heatmap)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # paths are bytes, perhaps not UTF-8
    run_script(main)
