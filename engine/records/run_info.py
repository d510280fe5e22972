# SPDX-License-Identifier: BSD-3-Clause
"""What a run is: its first log lines, args.json, and the versions that it ran on."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import os
import platform
import subprocess
from typing import Any, Sequence

from engine import console
from engine.data.datasets import EMBEDDED, ImageDataset
from engine.data.images import decoder_name
from engine.device.compute import ComputeDevice
from engine.errors import UsageError, printable
from engine.parallel.communicator import Communicator
from engine.records.logger import Logger

import numpy as np
import torch


def log_run_info(
    args: argparse.Namespace,
    group: Communicator,
    accelerator: ComputeDevice,
    logger: Logger,
    train_set: ImageDataset | None,
    val_set: ImageDataset | None,
) -> None:
    """Describe the run in a few lines, and in bad_images.txt if images are left out."""
    device_name = f"{group.world_size} × {args.device} ({accelerator.name()})"
    console.line(f"=> {args.arch} on {device_name}, {args.precision}, torch {torch.__version__}")
    datasets = {"training": train_set, "validation": val_set}
    counts = [f"{len(dataset):,} {kind} images" for kind, dataset in datasets.items() if dataset is not None]
    source = "synthetic" if args.dummy else args.data or f"{EMBEDDED} (no --data given)"
    sizes = ", ".join(counts) or f"{args.dummy:,} images"
    console.line(f"=> data: {source}, {sizes}, {args.image_size} pixels per side")
    if train_set is not None:
        console.line(f"=> {describe_balance(train_set.classes, train_set.labels)}")
        if args.mixup or args.cutmix:
            console.line("=> images are mixed: the training accuracy is that of the larger part of each")
    # Both parts of --val-split name the same images.
    unreadable = list(
        dict.fromkeys(image for dataset in (train_set, val_set) if dataset for image in dataset.unreadable)
    )
    if unreadable:
        path = os.path.join(args.output_dir, "bad_images.txt")
        console.line(f"=> skipping {len(unreadable):,} unreadable images, listed in {path}")
        if group.rank == 0:
            _write(path, "".join(f"{name}\t{reason}\n" for name, reason in unreadable))


def write_args(args: argparse.Namespace, accelerator: ComputeDevice, logger: Logger) -> None:
    """Write args.json on rank 0: the flags, with what they were resolved to, and versions."""
    if not logger.writes:
        return
    processes = args.nodes * args.processes
    record = {"flags": vars(args), "processes": processes, "decoder": decoder_name(), **versions(accelerator)}
    _write(os.path.join(args.output_dir, "args.json"), json.dumps(record, indent=2, sort_keys=True) + "\n")


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def describe_balance(classes: Sequence[str], labels: np.ndarray) -> str:
    """Return the number of classes, and the smallest and the largest of them."""
    counts = np.bincount(labels, minlength=len(classes))
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    if counts[smallest] == counts[largest]:
        return f"{len(classes):,} classes of {counts[largest]:,} training images each"
    return (
        f"{len(classes):,} classes: the smallest, {printable(classes[smallest])}, has {counts[smallest]:,} training "
        f"images, the largest, {printable(classes[largest])}, {counts[largest]:,}"
    )


def versions(accelerator: ComputeDevice) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": accelerator.name(),
        "commit": git_commit(),
    }


def program_checksum() -> str:
    """Return the start of the SHA-256 of this program's files, which tells two versions of it apart."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    files = glob.glob(os.path.join(root, "*.py"))
    files += glob.glob(os.path.join(root, "engine", "**", "*.py"), recursive=True)
    checksum = hashlib.sha256()
    for path in sorted(files):
        with open(path, "rb") as file:
            checksum.update(file.read())
    return checksum.hexdigest()[:12]


def git_commit() -> str | None:
    """Return the commit of the clone that this program is in, else None."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    try:
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:  # git is not installed
        return None
    return finished.stdout.decode().strip() or None
