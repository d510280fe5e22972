# SPDX-License-Identifier: BSD-3-Clause
"""Export the network of a checkpoint: to ONNX, from bytes of images to probabilities, or its weights alone.

    python export.py --checkpoint model_best.pth.tar --output vgg16.onnx
    python export.py --checkpoint model_best.pth.tar --output small.onnx --quantize int8 --calibrate /data/imagenet
    python export.py --checkpoint model_best.pth.tar --output vgg16.safetensors

ONNX: input `images`: (N, S, S, 3) uint8, RGB, any N. Outputs `logits` and `probabilities`: (N, classes) float32.
Normalization is inside; class names and S are in the metadata. The file is kept only if onnxruntime computes what torch
computes, and if --calibrate finds no loss. Other files: weights by torchvision's names, and what --pretrained,
predict.py and export.py need to read them like a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import warnings
from typing import Any, Callable, Iterator, Sequence

from engine import console  # first of all: engine sets variables that torch reads when it is imported
from engine.checkpoints import CLASSES_HELP, Model, check_output, factorize, load_model, save_safetensors
from engine.data import Preprocessing
from engine.errors import EXIT_FAILURE, UsageError, UserError, counted
from engine.evaluation import classify, open_images, read_images
from engine.parser import OneLineParser, nonempty_path, number
from engine.versions import check_numpy

import vgg

import numpy as np
import torch

# Of probabilities, and of logits relative to the largest: in fp32, large logits differ by more.
TOLERANCE, FP16_TOLERANCE = 1e-4, 2e-2
OPSET = 11  # the oldest that can express the network; Ascend's atc and every current onnxruntime read it
INT8_OPSET = 13  # the oldest with a scale per channel
BATCH, CALIBRATION_IMAGES = 8, 256  # training images, from which the ranges of all activations are taken
ONNX = ["onnx", "onnxruntime"]
FP16_ONNX = ["onnxruntime.transformers.onnx_model"]
INT8_ONNX = ["onnx.version_converter", "onnxruntime.quantization"]
PTH = (".pth.tar", ".pth")
Predict = Callable[[torch.Tensor], torch.Tensor]  # (N, S, S, 3) uint8 to logits (N, classes)


class ExportMismatchError(UserError):
    """The exported file computes something else."""

    exit_code = EXIT_FAILURE


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser("export.py", (__doc__ or "").splitlines()[0])
    add, path = parser.add_argument, nonempty_path
    add("--checkpoint", type=path, metavar="FILE", required=True, help="weights of main.py or of another program")
    output = "*.onnx, *.safetensors or *.pth.tar (default: %(default)s)"
    add("--output", type=path, metavar="FILE", default="vgg16.onnx", help=output)
    add("--classes", type=path, metavar="FILE", help=CLASSES_HELP)
    layout = "input of an ONNX file: bytes (N, S, S, 3), or normalized (1, 3, S, S) as ModelZoo's, with a file for AIPP"
    add("--layout", choices=["nhwc", "nchw"], default="nhwc", help=layout)
    names = "name the weights in a *.pth.tar file as ModelZoo's demo.py and pthtar2onnx.py read them"
    add("--reference-names", action="store_true", help=names)
    add("--dtype", choices=["fp32", "fp16"], default="fp32", help="of the weights (default: %(default)s)")
    add("--quantize", choices=["int8"], help="8 bits for weights and activations; requires --calibrate")
    svd = "smaller linear layers: singular values of fc6 and fc7 to keep, or the share of their energy, such as 0.9 0.9"
    add("--svd-rank", nargs=2, type=rank_or_share, metavar="R", help=svd)
    data = "as main.py's --data: its validation images compare the file with the checkpoint, training images calibrate"
    add("--calibrate", type=path, metavar="DATA", help=data)
    add(
        "--max-drop", type=number(float, 0), metavar="POINTS", help="top-1 accuracy that the file may lose (default: 1)"
    )
    args = parser.parse_args(argv)
    if not args.output.endswith((".onnx", ".safetensors", *PTH)):
        parser.error(f"--output {args.output}: the name must end in .onnx or .safetensors, or in .pth.tar")
    for_onnx = {"--layout nchw": args.layout == "nchw", "--quantize": args.quantize, "--svd-rank": args.svd_rank}
    for flag, given in for_onnx.items():
        if given and not args.output.endswith(".onnx"):
            parser.error(f"{flag} requires an --output that ends in .onnx, got {args.output}")
    if args.reference_names and not args.output.endswith(PTH):
        parser.error(f"--reference-names requires an --output that ends in .pth.tar, got {args.output}")
    for flag, given in {"--quantize int8": args.quantize, "--max-drop": args.max_drop is not None}.items():
        if given and not args.calibrate:
            parser.error(f"{flag} requires --calibrate DATA")
    return args


def rank_or_share(text: str) -> float:
    """An argparse type: an integer from 1, or with a point a share between 0 and 1."""
    return number(float, above=0, below=1)(text) if "." in text else number(int, 1)(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and verify it. Raises UsageError, CheckpointError, DataError, ExportMismatchError."""
    args = parse_args(argv)
    check_numpy()
    is_onnx, fp16 = args.output.endswith(".onnx"), args.dtype == "fp16"
    needed = INT8_ONNX if args.quantize else FP16_ONNX if fp16 else []
    import_modules(*(ONNX + needed if is_onnx else []), *["safetensors"] * args.output.endswith(".safetensors"))
    check_output(args.output, args.checkpoint)
    source = load_model(args.checkpoint, args.classes)
    network, preprocessing = source.network.requires_grad_(False), source.preprocessing
    if args.reference_names and network.head != "paper":
        raise UsageError("--reference-names: ModelZoo has no network like this (--head linear)")
    model = FromBytes(network, preprocessing.mean, preprocessing.std, args.layout == "nchw").eval()
    batch_size, before, calibration = 1 if args.layout == "nchw" else BATCH, None, None
    with new_file(args.output) as temporary:
        if args.calibrate:
            options = {"renamed": bool(args.classes), "training": bool(args.quantize)}
            train, val = open_images(args.calibrate, source.classes, source.val_split, **options)
        classifier = factorize(network, args.svd_rank) if args.svd_rank else network.classifier
        if args.calibrate:
            before = classify(val, preprocessing, model.predict, batch_size)
            if train is not None:
                chosen = np.linspace(0, len(train) - 1, min(CALIBRATION_IMAGES, len(train))).astype(int)
                console.line(f"=> calibrating on {counted(len(chosen), 'training image')}")
                calibration = (images for images, _ in read_images(train, preprocessing, chosen, batch_size))
        network.classifier = classifier
        if is_onnx:
            predict, what = export_onnx(source, model, temporary, calibration, fp16)
        else:
            predict, what = export_weights(source, model, temporary, args.output, fp16, args.reference_names)
        line = f"{os.path.getsize(temporary) / 1e6:.1f} MB"
        if before is not None:
            after = classify(val, preprocessing, predict, batch_size)
            line += f", {after.describe(before)}"
            max_drop = 1.0 if args.max_drop is None else args.max_drop
            if before.acc1 - after.acc1 > max_drop + 1e-9:
                raise ExportMismatchError(f"{line}: a loss above --max-drop {max_drop:g}, so no file is written")
        elif args.svd_rank or fp16:
            line += "; --calibrate DATA would compare its predictions with the checkpoint's"
        if args.layout == "nchw":
            with new_file(f"{args.output[: -len('.onnx')]}.aipp.cfg") as path, open(path, "w") as file:
                file.write(aipp_config(preprocessing))
    console.line(f"{args.output}: {what}")
    console.line(f"=> {line}")
    return 0


@contextlib.contextmanager
def new_file(path: str) -> Iterator[str]:
    """Yield a temporary name; the file becomes `path` if the block succeeds, else it is removed. Raises UsageError."""
    temporary = f"{path}.tmp"
    try:
        open(temporary, "wb").close()  # fails now, not when all is computed
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def import_modules(*names: str) -> list[Any]:
    """Return optional modules. Raises UsageError if one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        if error.name == "transformers":  # onnxruntime imported it beside its converter once, for tools of its own
            advice = "use Python 3.8 or later and a newer one, or write a .pth.tar file"
            raise UsageError(f"--dtype fp16: this onnxruntime is too old: {advice}") from error
        needed = ["onnx", "onnxruntime"] if names[0] in ONNX else []
        needed += [name for name in [error.name or names[0]] if name not in needed]
        raise UsageError(f"{needed[-1]} is not installed: pip install {' '.join(needed)}") from error


# --- what is exported -------------------------------------------------------------------------------------------------


class FromBytes(torch.nn.Module):
    """(N, S, S, 3) uint8 to logits and probabilities, both (N, classes).

    normalized: images are normalized outside; (N, 3, S, S) to logits, as in ModelZoo's pthtar2onnx.py.
    """

    def __init__(
        self, network: torch.nn.Module, mean: Sequence[float], std: Sequence[float], normalized: bool = False
    ) -> None:
        super().__init__()
        self.network, self.normalized = network, normalized
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))
        self.names = ["actual_input_1", "output1"] if normalized else ["images", "logits", "probabilities"]

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input of `forward` for (N, S, S, 3) uint8 images."""
        return self._normalize(images) if self.normalized else images

    def _normalize(self, images: torch.Tensor) -> torch.Tensor:
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.normalized:
            return (self.network(images),)
        logits = self.network(self._normalize(images))
        return logits, logits.softmax(1)

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits for (N, S, S, 3) uint8 images."""
        return self(self.prepare(images))[0]


def rectify_first(network: vgg.VGG) -> None:
    """Put each stage's ReLU in front of its max-pool, which changes no value: runtimes fuse it with the convolution.

    In int8, negative values would cost half the range.
    """
    layers = list(network.features)
    for position, layer in enumerate(layers[:-1]):
        if isinstance(layer, torch.nn.MaxPool2d):
            layers[position : position + 2] = layers[position + 1], layer
    network.features = torch.nn.Sequential(*layers)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def export_onnx(
    source: Model, model: FromBytes, path: str, calibration: Iterator[torch.Tensor] | None, fp16: bool
) -> tuple[Predict, str]:
    """Write an ONNX file. Returns what it predicts, and a description of it. Raises ExportMismatchError.

    calibration: batches of (N, S, S, 3) uint8 images for int8, else None.
    """
    onnx, onnxruntime = import_modules(*ONNX)
    rectify_first(source.network)
    size = source.preprocessing.image_size
    images = torch.randint(0, 256, (5, size, size, 3), generator=torch.Generator().manual_seed(0)).byte()
    trace(model, model.prepare(images[: 1 if model.normalized else 2]), path)
    if calibration:
        quantize(path, model, calibration)
    content = onnx.load(path)
    if fp16 and calibration:
        console.line("=> --dtype fp16 changes nothing beside --quantize int8: all weights have 8 bits")
    elif fp16:
        converter = import_modules(*FP16_ONNX)[0].OnnxModel(content)
        converter.convert_float_to_float16(use_symbolic_shape_infer=False)
        converter.topological_sort()
        content = converter.model
    facts = {"classes": source.classes, "exif_rotate": False, **source.preprocessing.to_dict()}
    for key, value in facts.items():
        content.metadata_props.add(key=key, value=json.dumps(int(value) if isinstance(value, bool) else value))
    onnx.checker.check_model(content)
    onnx.save(content, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = max(largest_difference(session, model, batch) for batch in (images, images[:1]))
    tolerance = np.inf if calibration else FP16_TOLERANCE if fp16 else TOLERANCE  # of int8, the accuracy is compared
    if not difference <= tolerance:
        raise ExportMismatchError(
            f"onnxruntime and torch differ by {difference:.1e}, more than {tolerance:.0e}: the file is not written"
        )
    what = f"{counted(len(source.classes), 'class')}, {size} pixels per side"
    what += "" if calibration else f", differs from torch by at most {difference:.1e}"
    return lambda batch: run(session, model, batch)[0], f"{what} (onnxruntime {onnxruntime.__version__})"


def aipp_config(preprocessing: Preprocessing) -> str:
    """Return the file for atc's --insert_op_conf that puts the normalization of an NCHW file into the converted model.

    Its input is then (N, S, S, 3) uint8, RGB. AIPP computes (byte - mean_chn - min_chn) * var_reci_chn for each
    channel; mean_chn is an integer, so min_chn takes the mean.
    """
    lines = ["aipp_mode: static", "input_format: RGB888_U8", "csc_switch: false", "rbuv_swap_switch: false"]
    lines += [f"src_image_size_{side}: {preprocessing.image_size}" for side in "wh"]
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std)):
        lines += [f"min_chn_{channel}: {255 * mean:.9g}", f"var_reci_chn_{channel}: {1 / (255 * std):.9g}"]
    return "\n    ".join(["aipp_op {", *lines]) + "\n}\n"


def trace(model: Any, example: torch.Tensor, path: str) -> None:
    """Trace the model into an ONNX file, whose first dimension is free if the example has several images."""
    # Since torch 2.9 another exporter is the default, which needs the package onnxscript and does not trace.
    options: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    names = {"input_names": model.names[:1], "output_names": model.names[1:]}
    if len(example) > 1:
        options["dynamic_axes"] = {name: {0: "N"} for name in model.names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that sizes become constants, as they should
        torch.onnx.export(model, (example,), path, opset_version=OPSET, **names, **options)


def quantize(path: str, model: FromBytes, calibration: Iterator[torch.Tensor]) -> None:
    """Quantize an ONNX file to int8, statically, each output channel of a weight with its own scale."""
    onnx, version_converter, quantization = import_modules("onnx", *INT8_ONNX)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(calibration, None)
            return None if images is None else {model.names[0]: model.prepare(images).numpy()}

    content = version_converter.convert_version(onnx.load(path), INT8_OPSET)  # torch 1.5 writes no opset above 12
    softmax = [node.name for node in content.graph.node if node.op_type == "Softmax"]
    onnx.save(content, path)
    quantization.quant_pre_process(path, path, skip_symbolic_shape=True)
    quantization.quantize_static(
        path,
        path,
        Reader(),
        per_channel=True,
        op_types_to_quantize=["Conv", "Relu", "MaxPool", "Gemm", "Softmax"],
        nodes_to_exclude=softmax,  # it is named, because onnxruntime 1.19 sets its range, which must be there
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # logits of 8 bits would often be equal
    )


def run(session: Any, model: FromBytes, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the outputs of an ONNX file for (N, S, S, 3) uint8 images."""
    inputs, (first,) = model.prepare(images).numpy(), session.get_inputs()
    parts = np.split(inputs, len(inputs)) if first.shape[0] == 1 else [inputs]
    outputs = [session.run(None, {first.name: part}) for part in parts]
    return [torch.from_numpy(np.concatenate(parts)) for parts in zip(*outputs)]


def largest_difference(session: Any, model: Any, images: torch.Tensor) -> float:
    """Return the largest difference between onnxruntime and torch: of probabilities, and of logits over the largest."""
    with torch.no_grad():
        expected = model(model.prepare(images))
    scales = expected[0].abs().max().clamp(min=1e-6), 1.0
    pairs = zip(run(session, model, images), expected, scales)
    return torch.stack([((output - wanted) / scale).abs().max() for output, wanted, scale in pairs]).max().item()


# --- weights alone ----------------------------------------------------------------------------------------------------


def export_weights(
    source: Model, model: FromBytes, path: str, name: str, fp16: bool, reference_names: bool
) -> tuple[Predict, str]:
    """Write the weights to a file that will have a `name`. Returns what they predict, and a description of the file."""
    network = source.network
    weights = (network.half() if fp16 else network).state_dict()
    info: dict[str, Any] = {"arch": network.arch, "classes": source.classes, "val_split": source.val_split}
    info["preprocessing"] = source.preprocessing.to_dict()
    if name.endswith(PTH):
        named = vgg.to_modelzoo_names(weights) if reference_names else weights
        torch.save({"state_dict": named, **info}, path, _use_new_zipfile_serialization=True)
    else:
        save_safetensors(weights, path, **info)
    network.float()  # with the values that were written
    return model.predict, f"{len(weights)} tensors, {counted(len(source.classes), 'class')}"


if __name__ == "__main__":
    console.run_script(main, main_flags=False)
