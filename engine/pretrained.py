# SPDX-License-Identifier: BSD-3-Clause
"""The weights of --pretrained; torchvision's for ImageNet are found in torch.hub's cache, or downloaded once."""

from __future__ import annotations

import hashlib
import os
import urllib.error
from typing import Any

from engine.checkpoint import load_checkpoint
from engine.errors import UsageError, first_line

import torch

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


def read_pretrained(name: str, arch: str) -> dict[str, Any]:
    """Read the file of --pretrained; `imagenet`: torchvision's weights for arch. Raises CheckpointError, UsageError."""
    return load_checkpoint(imagenet_weights(arch) if name == "imagenet" else name)


def imagenet_weights(arch: str) -> str:
    """Return the path of the weights, downloaded if they are not there. Raises UsageError."""
    name = FILES[arch]
    checksum = name.partition("-")[2].partition(".")[0]
    home = torch.hub.get_dir() if hasattr(torch.hub, "get_dir") else torch.hub._get_torch_home()  # torch 1.5
    path = os.path.join(home, "checkpoints", name)
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(URL + name, path, hash_prefix=checksum)
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # no network, no disk, another checksum
            raise UsageError(
                f"--pretrained imagenet: cannot download {URL}{name} ({first_line(error)}); download it elsewhere and "
                f"put it at {path}"
            ) from error
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            digest.update(block)
    if not digest.hexdigest().startswith(checksum):
        raise UsageError(f"{path}: its SHA-256 checksum does not start with {checksum}: delete it and try again")
    return path
