# SPDX-License-Identifier: BSD-3-Clause
"""Classify images: top-5 predictions for each, with the weights of a checkpoint. Or write their features to a file.

    python predict.py dog.jpg --checkpoint model_best.pth.tar
    python predict.py holiday/ --checkpoint vgg16.pth --classes imagenet_classes.txt --csv > holiday.csv
    python predict.py dog.jpg --checkpoint model_best.pth.tar --heatmap dog_heatmap.png
    python predict.py holiday/ --checkpoint vgg16.pth --features fc7 --output holiday.npy

Accepts every checkpoint that main.py reads. If it holds EMA weights (--ema-decay), they are used.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import os
from typing import Any, NamedTuple, Sequence

from engine import console  # first of all: engine sets variables that torch reads when it is imported
from engine.checkpoints import CLASSES_HELP, Model, load_model
from engine.data import FileList, ImageBatches, describe_left_out, read_batches, worker_options
from engine.device import ComputeDevice, available_cores, resolve_device, resolve_device_list
from engine.errors import EXIT_USAGE, UsageError
from engine.options import DEVICE_FLAG
from engine.parser import OneLineParser, check_file, nonempty_path, number
from engine.records import feature_file

import vgg

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

MAX_HEATMAPS = 24
VECTORS = ("fc6", "fc7", "logits")  # the layers that are not maps
NOTES = {".txt", ".csv", ".json", ".md"}  # beside images; that they are left out surprises nobody
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
    add, path, count = parser.add_argument, nonempty_path, number(int, 1)
    add("images", metavar="IMAGE|DIR", nargs="+", type=path, help="images, or folders of images")
    add("--checkpoint", type=path, metavar="FILE", required=True, help="weights of main.py or of another program")
    add("--classes", type=path, metavar="FILE", help=CLASSES_HELP)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object per image: image, predictions")
    output.add_argument("--csv", action="store_true", help="print image,rank,class,probability")
    output.add_argument("--features", metavar="LAYER", help="write the values of a layer: fc7, pool5, relu5_3, …")
    pools = ("avg", "max", "none")
    add("--pool", choices=pools, help="of relu and pool layers: one value per channel (default: avg), or whole maps")
    add("--output", type=path, metavar="FILE.npy", help="a row of features per image; FILE.txt names the images")
    add("--heatmap", type=path, metavar="OUT.png", help="draw what each top prediction is based on (Grad-CAM)")
    add("--top-k", type=count, default=5, metavar="K", help="predictions per image (default: 5)")
    add("-b", "--batch-size", type=count, default=32, metavar="N", help="images at a time (default: 32)")
    add("--device", **DEVICE_FLAG)
    add("--gpu", type=number(int, 0), metavar="N", help="the number of the device (default: 0)")
    return parser.parse_args(argv)


def check_features(
    layer: str | None, pool: str | None, output: str | None, heatmap: str | None, kept: dict[str, str | None]
) -> None:
    """Raise UsageError if the flags of --features do not fit together. kept: {flag: file}, not to be overwritten."""
    if not layer:
        if output or pool:
            raise UsageError(f"{'--output' if output else '--pool'} requires --features LAYER")
        return
    if output is None or not output.endswith(".npy"):
        raise UsageError("--features requires --output FILE.npy" + (f", got {output}" if output else ""))
    if heatmap:
        raise UsageError("--features makes no predictions to draw: leave --heatmap out")
    rows, names = feature_file.paths(output)
    written = [os.path.realpath(rows), os.path.realpath(names)]
    overwritten = [f"{flag} {file}" for flag, file in kept.items() if file and os.path.realpath(file) in written]
    if os.path.isfile(names) and not os.path.exists(rows):  # not those of earlier features
        overwritten.append(names)
    if overwritten:
        raise UsageError(f"--output {output}: would overwrite {overwritten[0]}: choose another name")
    if layer in VECTORS and pool in ("avg", "max"):
        raise UsageError(f"--pool {pool}: {layer} has no maps to pool: leave it out")


def check_layer(layer: str, network: vgg.VGG, output: str) -> None:
    """Raise UsageError if the network lacks a layer, or its features cannot be written."""
    known = network.layer_names()
    if layer not in known:
        raise UsageError(f"--features {layer}: no such layer in this {network.arch}; its layers: {', '.join(known)}")
    for file in feature_file.paths(output):
        check_file("--output", file)


def features(network: vgg.VGG, inputs: torch.Tensor, layer: str, pool: str) -> np.ndarray:
    """Return the values of a layer for each image, float32: (N, C), or (N, C, h, w) of maps that are not pooled."""
    values = network.forward_features(inputs, [layer])[layer]
    if layer not in VECTORS and pool != "none":
        values = values.flatten(2).mean(2) if pool == "avg" else values.flatten(2).max(2)[0]
    return values.cpu().numpy()


def load_images(files: FileList, model: Model, batch_size: int, device: ComputeDevice) -> DataLoader:
    """Return batches (images, target, indices, errors), read by a worker per core if there is more than one batch."""
    batches = [(0, part) for part in np.split(np.arange(len(files)), range(batch_size, len(files), batch_size))]
    workers = min(available_cores(), len(batches)) if len(batches) > 1 else 0
    return DataLoader(
        ImageBatches(files, model.preprocessing, leave_out=True),  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        **device.loader_options(),
        **worker_options(workers),
    )


def grad_cam(network: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (heatmaps (N, h, w) in [0, 1], logits (N, classes)); a heatmap shows what the top prediction is based on.

    network: a VGG. images: (N, 3, S, S), normalized. h and w: of the last convolution's maps. Selvaraju et al.,
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


def check_heatmap(path: str, files: FileList) -> None:
    """Raise UsageError if a heatmap cannot be drawn or written, before any image is read."""
    if len(files) > MAX_HEATMAPS:
        raise UsageError(f"--heatmap: at most {MAX_HEATMAPS} images, got {len(files)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--heatmap requires matplotlib: pip install matplotlib")
    if not path.lower().endswith((".png", ".jpg", ".pdf", ".svg")):
        raise UsageError(f"--heatmap {path}: the name must end in .png, .jpg, .pdf or .svg")
    if os.path.realpath(path) in map(os.path.realpath, files.paths):
        raise UsageError(f"--heatmap {path}: would overwrite an input image: choose another name")
    check_file("--heatmap", path)


def as_text(text: str) -> str:
    """Return what matplotlib draws as this text: no bytes of paths, and no formula between two $."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def draw_heatmaps(rows: list[HeatmapRow], path: str) -> None:
    """Draw image, heatmap and predictions, one row per image. Raises UsageError if the file cannot be written."""
    from matplotlib import cm, font_manager, rc_context
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans"] + [name for name in CJK_FONTS if name in installed]
    with rc_context({"font.family": fonts}):
        figure = Figure(figsize=(9.6, 2.9 * len(rows)), constrained_layout=True)
        axes = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1.2]})
        for (left, middle, right), row in zip(axes, rows):
            size = len(row.image)
            left.imshow(row.image)
            left.set_title(as_text(os.path.basename(row.path)[-32:]), loc="left", fontsize=9)
            middle.imshow(row.image)
            smooth = F.interpolate(row.heat[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
            overlay = cm.jet(smooth.numpy())  # type: ignore[attr-defined]
            overlay[..., 3] = 0.55 * smooth.numpy() ** 0.5  # parts that do not matter stay as they are
            middle.imshow(overlay)
            middle.set_title(as_text(f"based on: {row.predictions[0].name}"[:40]), loc="left", fontsize=9)
            bars = right.barh(
                range(len(row.predictions)), [p.probability for p in row.predictions], color="#4c78a8", height=0.5
            )
            for bar, (name, probability) in zip(bars, row.predictions):
                right.text(0, bar.get_y() - 0.08, as_text(f"{name[:34]}  {probability:.1%}"), fontsize=8, va="bottom")
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
        console.exit_process(0)
    except OSError as error:
        raise UsageError(f"the predictions cannot be printed ({error.strerror})") from error


def top_predictions(logits: torch.Tensor, classes: list[str], count: int) -> list[list[Prediction]]:
    """Return the most probable classes of each image, best first."""
    tops = zip(*(part.tolist() for part in logits.softmax(1).topk(min(count, len(classes)))))
    return [[Prediction(classes[label], value) for value, label in zip(*top)] for top in tops]


def main(argv: Sequence[str] | None = None) -> int:
    """Print predictions or write features. Returns 2 if some images could not be read, else 0. Raises UserError."""
    args = parse_args(argv)
    kept = {"--checkpoint": args.checkpoint, "--classes": args.classes}
    check_features(args.features, args.pool, args.output, args.heatmap, kept)
    files = FileList.find(args.images)
    if files.left_out.keys() - NOTES:
        console.notice(describe_left_out(files.left_out))
    if args.heatmap:
        check_heatmap(args.heatmap, files)
    name, count = resolve_device("gpu" if args.device == "cuda" else args.device)
    device = ComputeDevice(name, resolve_device_list(None, args.gpu or 0, name, count, one_device=True)[0])
    model = load_model(args.checkpoint, args.classes)
    if args.features:
        check_layer(args.features, model.network, args.output)
    device.place(model.network.requires_grad_(False))
    normalize = device.normalizer(model.preprocessing.mean, model.preprocessing.std)
    code, rows = 0, []
    if args.csv:
        print_result("image,rank,class,probability")
    output: Any = feature_file.write(args.output, len(files)) if args.features else contextlib.nullcontext()
    with torch.no_grad(), console.progress(len(files), 0, "Images"), output as add_features:
        for images, _, indices, errors in read_batches(load_images(files, model, args.batch_size, device)):
            console.advance(len(indices) + len(errors))
            for error in errors:
                console.error(str(error))
                code = EXIT_USAGE
            if not len(indices):
                continue
            inputs = normalize(images)
            if args.features:
                names = [files.name(index) for index in indices]
                add_features(names, features(model.network, inputs, args.features, args.pool or "avg"))
                continue
            heat, logits = grad_cam(model.network, inputs) if args.heatmap else (None, model.network(inputs))
            if not torch.isfinite(logits.softmax(1)).all():
                raise UsageError(f"{args.checkpoint}: its predictions are not finite: use another checkpoint")
            for position, predictions in enumerate(top_predictions(logits, model.classes, args.top_k)):
                path = files.name(indices[position])
                print_result(format_predictions(path, predictions, as_json=args.json, as_csv=args.csv))
                if heat is not None:  # a copy, because workers use a batch's memory again
                    rows.append(HeatmapRow(path, images[position].numpy().copy(), heat[position].cpu(), predictions))
    for problem in files.errors:
        console.error(problem)
        code = EXIT_USAGE
    if rows:
        draw_heatmaps(rows, args.heatmap)
        console.notice(f"heatmap written to {args.heatmap}")
    return code


if __name__ == "__main__":
    console.run_script(main, main_flags=False)
