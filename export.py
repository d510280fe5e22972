# SPDX-License-Identifier: BSD-3-Clause
"""Export the network of a checkpoint: to ONNX, from bytes of images to probabilities, or its weights to safetensors.

    python export.py --checkpoint model_best.pth.tar --output vgg16.onnx
    python export.py --checkpoint model_best.pth.tar --output vgg16.safetensors

ONNX: input `images`: (N, S, S, 3) uint8, RGB, any N. Outputs `logits` and `probabilities`: (N, classes) float32.
Normalization is inside; class names and S are in the file's metadata. The file is kept only if onnxruntime computes
what torch computes. safetensors: torchvision's names, fp32; architecture, class names and preprocessing in the
metadata, so that --pretrained, predict.py and export.py read the file like a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import warnings
from typing import Any, Iterator, Sequence

import engine  # noqa: F401  sets variables that torch reads when it is imported
from engine import console
from engine.checkpoints import CLASSES_HELP, load_model, save_safetensors
from engine.console import run_script
from engine.errors import EXIT_FAILURE, UsageError, UserError
from engine.options import OneLineParser, nonempty_path

import torch

TOLERANCE = 1e-4  # of probabilities, and of logits relative to the largest: in fp32, large logits differ by more
OPSET = 11  # the oldest that can express the network; Ascend's atc and every current onnxruntime read it


class ExportMismatchError(UserError):
    """The exported file computes something else."""

    exit_code = EXIT_FAILURE


class FromBytes(torch.nn.Module):
    """(N, S, S, 3) uint8 to logits and probabilities, both (N, classes)."""

    def __init__(self, network: torch.nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return logits, logits.softmax(1)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser("export.py", (__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=nonempty_path, metavar="FILE", required=True, help="main.py's, ModelZoo's or torchvision's"
    )
    parser.add_argument(
        "--output",
        type=nonempty_path,
        metavar="FILE",
        default="vgg16.onnx",
        help="*.onnx or *.safetensors (default: %(default)s)",
    )
    parser.add_argument("--classes", type=nonempty_path, metavar="FILE", help=CLASSES_HELP)
    args = parser.parse_args(argv)
    if not args.output.endswith((".onnx", ".safetensors")):
        parser.error(f"--output {args.output}: the name must end in .onnx or .safetensors")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and verify it. Raises UsageError, CheckpointError, ExportMismatchError."""
    args = parse_args(argv)
    if args.output.endswith(".safetensors"):
        export_safetensors(args)
    else:
        export_onnx(args)
    return 0


@contextlib.contextmanager
def new_file(path: str) -> Iterator[str]:
    """Yield a temporary name; the file becomes `path` if the block succeeds, else it is removed.

    Raises UsageError if it cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"--output {path}: {error.strerror or error}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def export_safetensors(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError("safetensors is not installed: pip install safetensors")
    model = load_model(args.checkpoint, args.classes)
    weights = model.network.state_dict()
    with new_file(args.output) as temporary:
        info = {"classes": model.classes, "preprocessing": model.preprocessing.to_dict(), "val_split": model.val_split}
        save_safetensors(weights, temporary, arch=model.network.arch, **info)
    console.line(f"{args.output}: {len(weights)} tensors, {len(model.classes)} classes")


def export_onnx(args: argparse.Namespace) -> None:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: pip install onnx onnxruntime") from error
    source = load_model(args.checkpoint, args.classes)
    preprocessing = source.preprocessing
    model = FromBytes(source.network.requires_grad_(False), preprocessing.mean, preprocessing.std).eval()
    size = preprocessing.image_size
    images = torch.randint(0, 256, (5, size, size, 3), generator=torch.Generator().manual_seed(0)).byte()
    with new_file(args.output) as temporary:
        trace(model, images[:2], temporary)
        content = onnx.load(temporary)
        metadata = {
            "classes": json.dumps(source.classes),
            "image_size": str(size),
            "crop": str(int(preprocessing.crop)),
        }
        for key, value in metadata.items():
            content.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(content)
        onnx.save(content, temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        difference = max(largest_difference(session, model, batch) for batch in (images, images[:1]))
        if not difference <= TOLERANCE:
            raise ExportMismatchError(
                f"onnxruntime and torch differ by {difference:.1e}, more than {TOLERANCE:.0e}: {args.output} is not "
                "written"
            )
    console.line(
        f"{args.output}: {len(source.classes)} classes, {size} pixels per side, differs from torch by at most "
        f"{difference:.1e} (onnxruntime {onnxruntime.__version__})"
    )


def trace(model: torch.nn.Module, example: torch.Tensor, path: str) -> None:
    """Trace the model into an ONNX file whose first dimension is free."""
    names = ["images", "logits", "probabilities"]
    # Since torch 2.9 another exporter is the default, which needs the package onnxscript and does not trace.
    options: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that sizes become constants, as they should
        torch.onnx.export(
            model,
            (example,),
            path,
            input_names=names[:1],
            output_names=names[1:],
            opset_version=OPSET,
            dynamic_axes={name: {0: "N"} for name in names},
            **options,
        )


def largest_difference(session: Any, model: torch.nn.Module, images: torch.Tensor) -> float:
    """Return the largest difference between onnxruntime and torch: of probabilities, and of logits over the largest."""
    logits, probabilities = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
    with torch.no_grad():
        expected_logits, expected = model(images)
    scale = expected_logits.abs().max().clamp(min=1e-6)
    differences = (logits - expected_logits) / scale, probabilities - expected
    return torch.stack([difference.abs().max() for difference in differences]).max().item()  # NaN if there is one


if __name__ == "__main__":
    run_script(main)
