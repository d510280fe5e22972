# SPDX-License-Identifier: BSD-3-Clause
"""Trained models: the one in a checkpoint, ready to predict or to export, and torchvision's ImageNet weights."""

from __future__ import annotations

import os
from typing import NamedTuple

from engine.checkpoints.contents import load_checkpoint, load_weights
from engine.checkpoints.file import sha256
from engine.data import Preprocessing
from engine.errors import UsageError, UserError, counted, first_line

import vgg

import torch

CLASSES_HELP = "names of the classes, one per line, in order (default: those in the checkpoint, else numbers)"

# The file of each architecture (torchvision/models/vgg.py, IMAGENET1K_V1); its name ends with the start of its SHA-256.
URL = "https://download.pytorch.org/models/"
FILES = {
    "vgg11": "vgg11-8a719046.pth",
    "vgg13": "vgg13-19584684.pth",
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "vgg11_bn": "vgg11_bn-6002323d.pth",
    "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
}


class Model(NamedTuple):
    """A trained network and what belongs to it."""

    network: vgg.VGG
    classes: list[str]
    preprocessing: Preprocessing
    val_split: float | None  # --val-split of its training


def load_model(path: str, classes_file: str | None = None) -> Model:
    """Load the model of a checkpoint. Preprocessing is ImageNet's if the file does not say.

    Raises CheckpointError, or UsageError if it is not a VGG or the class names do not fit.
    """
    checkpoint = load_checkpoint(path)
    weights, info = checkpoint.best_weights, checkpoint.info
    network = vgg.network_of(weights)
    if network is None:
        raise UsageError(f"{path}: holds {vgg.describe_weights(weights)}")
    load_weights(network, weights, path)
    count = len(weights[f"{vgg.last_layer(weights)}.weight"])
    classes = read_classes(classes_file) if classes_file else [str(name) for name in info.classes or range(count)]
    if len(classes) != count:
        names = counted(len(classes), "class name")
        raise UsageError(f"{classes_file or path} has {names}, the network has {counted(count, 'class')}")
    return Model(network.eval(), classes, Preprocessing.from_dict(info.preprocessing), info.val_split)


def check_output(path: str, source: str) -> None:
    """Raise UsageError if a file made from a checkpoint would overwrite it, or another one of a training."""
    try:
        overwrites = os.path.samefile(path, source) or "optimizer" in load_checkpoint(path).progress
    except (OSError, UserError):  # no such file, or no checkpoint
        return
    if overwrites:
        raise UsageError(f"--output {path}: would overwrite a checkpoint: choose another name")


def read_classes(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows' Notepad puts a mark of UTF-8 in front
            return file.read().splitlines()
    except OSError as error:
        raise UsageError(f"--classes {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {path}: expected UTF-8 text") from error


def imagenet_weights(arch: str | None) -> str:
    """Return the path of the weights, downloaded if they are not there. arch: vgg16 if None. Raises UsageError."""
    name = FILES[arch or "vgg16"]
    checksum = name.partition("-")[2].partition(".")[0]
    home = torch.hub.get_dir() if hasattr(torch.hub, "get_dir") else torch.hub._get_torch_home()  # torch 1.5
    path = os.path.join(home, "checkpoints", name)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(URL + name, path, hash_prefix=checksum)
        except (OSError, RuntimeError) as error:  # no network, no disk, another checksum
            raise UsageError(
                f"--pretrained imagenet: cannot download {URL}{name} ({first_line(error)}); download it elsewhere and "
                f"put it at {path}"
            ) from error
    with open(path, "rb") as file:
        intact = sha256(file, os.path.getsize(path)).hexdigest().startswith(checksum)
    if not intact:
        raise UsageError(f"{path}: its SHA-256 checksum does not start with {checksum}: delete it and try again")
    return path
