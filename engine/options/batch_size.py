# SPDX-License-Identifier: BSD-3-Clause
"""--batch-size: its default for few images or little memory, and the images per step on another number of nodes."""

from __future__ import annotations

import argparse

from engine import console
from engine.errors import UsageError, counted


def default_batch_size(args: argparse.Namespace, images: int, size: int, memory: float) -> int:
    """Return --batch-size for few images or little memory, which ImageNet's default would not fit.

    Each process has the same power of two. An epoch has 20 steps or more (with the defaults SMALL 90), unless they
    would have fewer than 8 images.
    A batch takes half of the memory at most, less the 2 GB that each further process takes; VGG16's weights, gradients
    and momentum, and a checkpoint being written take 3 GB. Measured per image of 224 pixels on a CPU: 145 MB in fp32
    (VGG16-BN: 195), 57 in bf16; 40 to evaluate are an estimate.
    """
    room = 0.5 * memory - 2e9 * (args.processes - 1)
    per_image = 40e6 if args.evaluate else 200e6 if args.precision == "fp32" else 100e6
    limits = {
        counted(args.processes, "process"): args.batch_size,
        f"{memory / 1e9:.1f} GB of memory": room / (per_image * (size / 224) ** 2),
    }
    if images:
        steps = 90 if args.small_defaults else 20
        limits[counted(images, "image")] = max(images // steps, min(images, 8)) / (args.nodes * args.accum_steps)
    reason = min(limits, key=lambda name: limits[name])
    batch_size = args.processes
    while 2 * batch_size <= limits[reason]:
        batch_size *= 2
    if batch_size != args.batch_size:
        console.line(f"=> --batch-size {batch_size} in place of {args.batch_size}, for {reason}")
    return batch_size


def check_batch_size(args: argparse.Namespace) -> None:
    """Raise UsageError if the processes of this node cannot share the batch equally."""
    if args.batch_size % args.processes:
        below = args.batch_size // args.processes * args.processes
        nearest = f"{below} or {below + args.processes}" if below else str(args.processes)
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {counted(args.processes, 'process')}: use {nearest}"
        )


def keep_images_per_step(args: argparse.Namespace, wanted: int) -> None:
    """Make a step have the wanted number of images on this number of nodes, or scale the learning rates."""
    own = args.batch_size * args.nodes
    images = own * args.accum_steps
    if images == wanted:
        return
    nodes = counted(args.nodes, "node")
    if wanted % own == 0:
        args.accum_steps = wanted // own
        batches = counted(args.accum_steps, "batch")
        console.line(f"=> resized to {nodes}: {batches} per step, so a step still has {counted(wanted, 'image')}")
        return
    factor = images / wanted
    args.lr, args.min_lr = args.lr * factor, args.min_lr * factor
    console.line(
        f"=> resized to {nodes}: {counted(images, 'image')} per step in place of {wanted:,}, so learning rates are "
        f"multiplied by {factor:.4g}"
    )
