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
import functools
import importlib.util
import io
import json
import os
import sys
from typing import NamedTuple, Sequence

import engine  # noqa: F401  sets variables that torch reads when it is imported
import vgg
from engine import console
from engine.checkpoints.model import CLASSES_HELP, Model, load_model
from engine.console import exit_process, run_script
from engine.data.folder_index import EXTENSIONS
from engine.data.images import read_rgb, reason_of, resize, resize_center_crop
from engine.data.loader import init_worker, share, unchanged
from engine.device import choice as device
from engine.device.compute import ComputeDevice
from engine.errors import EXIT_USAGE, UsageError, UserError, printable
from engine.options.flags import DEVICE_HELP, DEVICES
from engine.options.parser import OneLineParser, check_file, nonempty_path, number

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

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
    parser.add_argument(
        "--checkpoint", type=nonempty_path, metavar="FILE", required=True, help="main.py's, ModelZoo's or torchvision's"
    )
    parser.add_argument("--classes", metavar="FILE", help=CLASSES_HELP)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per image: image, predictions")
    output.add_argument("--csv", action="store_true", help="print image,rank,class,probability")
    parser.add_argument("--heatmap", metavar="OUT.png", help="draw what each top prediction is based on (Grad-CAM)")
    parser.add_argument(
        "--top-k", type=number(int, 1), default=5, metavar="K", help="predictions per image (default: 5)"
    )
    parser.add_argument(
        "-b", "--batch-size", type=number(int, 1), default=32, metavar="N", help="images at a time (default: 32)"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES, help=DEVICE_HELP)
    parser.add_argument("--gpu", type=number(int, 0), metavar="N", help="the number of the device (default: 0)")
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


class ImageBatches:
    """Reads images for a DataLoader: `batches[paths]` is (those read, (n, S, S, 3) uint8 of them, error lines)."""

    def __init__(self, model: Model) -> None:
        self.center_crop, self.size = model.center_crop, model.image_size

    def __getitem__(self, paths: list[str]) -> tuple[list[str], torch.Tensor, list[str]] | UserError:
        read, images, errors = [], [np.empty((0, self.size, self.size, 3), np.uint8)], []
        for path in paths:
            try:
                image = read_rgb(path)  # prepared exactly as for validation
                crop = (
                    resize_center_crop(image, self.size) if self.center_crop else resize(np.asarray(image), self.size)
                )
            except Exception as error:  # Pillow raises nearly any type for a corrupt file
                errors.append(f"{printable(path)}: cannot be read as an image ({reason_of(error)})")
                continue
            read.append(path)
            images.append(crop[None])
        try:
            return read, share(torch.from_numpy(np.concatenate(images))), errors
        except UserError as error:  # /dev/shm is full
            return error


def load_images(paths: list[str], model: Model, batch_size: int, accelerator: ComputeDevice) -> DataLoader:
    """Return batches of images, read by a worker per core if there is more than one batch."""
    batches = [paths[first : first + batch_size] for first in range(0, len(paths), batch_size)]
    workers = min(device.available_cores(), len(batches)) if len(batches) > 1 else 0
    return DataLoader(
        ImageBatches(model),  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        collate_fn=unchanged,
        worker_init_fn=functools.partial(init_worker, os.getpid()),
        **accelerator.loader_options(workers),
    )


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


def check_heatmap(path: str) -> None:
    """Raise UsageError if a heatmap cannot be drawn or written, before any image is read."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--heatmap requires matplotlib: pip install matplotlib")
    if not path.lower().endswith((".png", ".jpg", ".pdf", ".svg")):
        raise UsageError(f"--heatmap {path}: the name must end in .png, .jpg, .pdf or .svg")
    check_file("--heatmap", path)


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


def print_result(text: str) -> None:
    """Print a result. Raises UsageError if it is lost. Ends the program if the reader has seen enough (`| head`)."""
    try:
        console.result(text)
    except BrokenPipeError:
        exit_process(0)
    except OSError as error:
        raise UsageError(f"the predictions cannot be printed ({error.strerror})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions for every image. Returns 2 if some could not be read, else 0. Raises UserError."""
    args = parse_args(argv)
    paths = find_images(args.images)
    if args.heatmap and len(paths) > MAX_HEATMAPS:
        raise UsageError(f"--heatmap: at most {MAX_HEATMAPS} images, got {len(paths)}")
    if args.heatmap:
        check_heatmap(args.heatmap)
    name, count = device.resolve_device("gpu" if args.device == "cuda" else args.device)
    accelerator = ComputeDevice(name, device.resolve_device_list(None, args.gpu or 0, name, count, one_device=True)[0])
    model = load_model(args.checkpoint, args.classes)
    accelerator.place(model.network.requires_grad_(False))
    normalize = accelerator.normalizer(model.mean, model.std)
    code = 0
    rows: list[HeatmapRow] = []
    if args.csv:
        print_result("image,rank,class,probability")
    with torch.no_grad(), console.progress(len(paths), 0, "Images"):
        for batch in load_images(paths, model, args.batch_size, accelerator):
            if isinstance(batch, UserError):
                raise batch
            read, images, errors = batch
            for error in errors:
                console.error(error)
                code = EXIT_USAGE
            if read:
                if args.heatmap:
                    heat, logits = grad_cam(model.network, normalize(images))
                else:
                    logits = model.network(normalize(images))
                top = [part.cpu() for part in logits.softmax(1).topk(min(args.top_k, len(model.classes)))]
                for position, path in enumerate(read):
                    values, indices = top[0][position].tolist(), top[1][position].tolist()
                    predictions = [Prediction(model.classes[i], value) for value, i in zip(values, indices)]
                    print_result(format_predictions(path, predictions, as_json=args.json, as_csv=args.csv))
                    if args.heatmap:
                        rows.append(HeatmapRow(path, images[position].numpy(), heat[position].cpu(), predictions))
            console.advance(len(read) + len(errors))
    if rows:
        draw_heatmaps(rows, args.heatmap)
        console.notice(f"heatmap written to {args.heatmap}")
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # paths are bytes, perhaps not UTF-8
    run_script(main)
