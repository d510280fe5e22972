# SPDX-License-Identifier: BSD-3-Clause
"""What a run starts from: a checkpoint to continue, pretrained weights, or nothing."""

from __future__ import annotations

import argparse
import hashlib
import os
import urllib.error
from typing import Any

from engine import console
from engine.checkpoints.contents import LATEST, PREVIOUS, load_checkpoint
from engine.checkpoints.file import lock_folder
from engine.errors import CheckpointError, UsageError, first_line
from engine.parallel.communicator import Communicator
from engine.records.logger import Logger

import torch

DEFAULT_ARCH = "vgg16"

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


def read_start(
    args: argparse.Namespace, group: Communicator, logger: Logger
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return (checkpoint to continue or evaluate, pretrained weights) on every process; None for what there is not.

    Rank 0 reads them, and locks the folder that it will save to. Raises CheckpointError or UsageError.
    """
    checkpoint = pretrained = None
    if group.rank == 0:
        if not args.evaluate:
            lock_folder(args.output_dir)
        checkpoint = find_checkpoint(args.resume, args.auto_resume, args.output_dir, logger)
        if checkpoint is None and args.pretrained:
            pretrained = read_pretrained(args.pretrained, args.arch or DEFAULT_ARCH)
    checkpoint, pretrained = group.broadcast((checkpoint, pretrained))
    given = args.resume or args.pretrained or (args.auto_resume and LATEST in os.listdir(args.output_dir))
    if checkpoint is None and pretrained is None and group.any(given):  # never a silent fresh start
        raise UsageError(
            "a process has a checkpoint to start from (--resume, --pretrained, or one in --output-dir), but rank 0, "
            "which reads it, has none: give it to rank 0"
        )
    if args.evaluate and checkpoint is None:  # --evaluate treats both alike
        return pretrained, None
    return checkpoint, pretrained


def find_checkpoint(resume: str | None, auto_resume: bool, folder: str, logger: Logger) -> dict[str, Any] | None:
    """Return the checkpoint to continue from, or None for a fresh start.

    resume: a file. auto_resume: take the newest intact checkpoint in `folder`. Raises CheckpointError.
    """
    if resume:
        console.line(f"=> resuming from '{resume}'")
        return load_checkpoint(resume)
    if not auto_resume:
        return None
    found = os.listdir(folder)  # unlike os.path.exists, it tells a file system that fails from a file that is not there
    corrupt: list[tuple[str, CheckpointError]] = []
    for name in (LATEST, PREVIOUS):
        if name not in found:
            continue
        path = os.path.join(folder, name)
        try:
            checkpoint = load_checkpoint(path)
        except CheckpointError as error:
            corrupt.append((path, error))
            console.warning(f"{error}; trying the one before it")
            continue
        console.line(f"=> resuming from '{path}'")
        for other, _ in corrupt:  # else the next save would keep it in place of the intact one
            os.replace(other, f"{other}.corrupt")
        return checkpoint
    if corrupt:
        raise corrupt[-1][1]  # never a silent fresh start
    return None


# --- pretrained weights -----------------------------------------------------------------------------------------------


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
