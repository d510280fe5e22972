# SPDX-License-Identifier: BSD-3-Clause
"""The trained model in a checkpoint, ready to predict or to export."""

from __future__ import annotations

from typing import NamedTuple

import vgg
from engine.checkpoints.contents import load_checkpoint, load_weights, model_weights
from engine.data.datasets import IMAGENET_MEAN, IMAGENET_STD
from engine.errors import UsageError

CLASSES_HELP = "names of the classes, one per line, in order (default: those in the checkpoint, else numbers)"


class Model(NamedTuple):
    """A trained network and what belongs to it."""

    network: vgg.VGG
    classes: list[str]
    image_size: int  # pixels per side
    center_crop: bool  # resize and crop the center, else resize the whole image
    mean: tuple[float, ...]  # of each channel, for pixels in [0, 1]
    std: tuple[float, ...]
    val_split: float | None  # --val-split of its training


def load_model(path: str, classes_file: str | None = None) -> Model:
    """Load the model of a checkpoint. Preprocessing is ImageNet's if the file does not say.

    Raises CheckpointError, or UsageError if it is not a VGG or the class names do not fit.
    """
    checkpoint = load_checkpoint(path)
    weights = model_weights(checkpoint, path)
    network = vgg.network_of(weights)
    if network is None:
        raise UsageError(f"{path}: holds weights, but not those of a VGG")
    count = len(weights[f"{vgg.LAST_LAYER}.weight"])
    if classes_file:
        classes = read_classes(classes_file)
    else:
        classes = [str(name) for name in checkpoint.get("classes") or range(count)]
    if len(classes) != count:
        names = f"{classes_file or path} has {len(classes)} class names"
        raise UsageError(f"{names}, the network has {count} classes")
    load_weights(network, weights, path)
    values = checkpoint.get("preprocessing") or {}
    return Model(
        network.eval(),
        classes,
        image_size=int(values.get("image_size", 224)),
        center_crop=bool(values.get("crop", True)),
        mean=values.get("mean", IMAGENET_MEAN),
        std=values.get("std", IMAGENET_STD),
        val_split=checkpoint.get("val_split"),
    )


def read_classes(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError as error:
        raise UsageError(f"--classes {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {path}: expected UTF-8 text") from error
