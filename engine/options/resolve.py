# SPDX-License-Identifier: BSD-3-Clause
"""What the flags mean: on this machine (resolved before anything starts), and for the data that was found."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any, Callable

import vgg
from engine import console
from engine.checkpoints.contents import model_weights
from engine.checkpoints.start import DEFAULT_ARCH
from engine.data.augmentation import CROP_SCALE, Augmentation, require_torchvision
from engine.data.datasets import ImageDataset, ImageFolder, is_split, preprocessing_of
from engine.data.images import default_scale
from engine.device import choice as device
from engine.device import choice as precision
from engine.errors import UsageError
from engine.options.parser import check_file, check_folder
from engine.parallel.launcher import Topology, resolve_topology, under_torchrun


def resolve_flags(args: argparse.Namespace) -> Topology:
    """Add to the flags what depends on this machine: device, precision, processes. Returns the topology."""
    args.device, count = device.resolve_device(args.device)
    one_device = not (args.multiprocessing_distributed or under_torchrun())
    args.device_list = device.resolve_device_list(args.device_list, args.gpu, args.device, count, one_device=one_device)
    args.dist_backend = device.resolve_backend(args.dist_backend, args.device)
    if len(set(args.device_list)) < len(args.device_list) and args.dist_backend != "gloo":
        raise UsageError("--device-list names a device twice: processes share one only with --dist-backend gloo")
    args.precision = precision.resolve_precision(
        args.device, args.device_list, amp=args.amp, opt_level=args.opt_level, amp_dtype=args.amp_dtype
    )
    if args.loss_scale_value == "dynamic" and args.precision == "fp16" and precision.needs_apex(args.device):
        raise UsageError("--loss-scale-value dynamic is not supported with apex: give a number")
    if args.loss_scale_value is not None and args.precision == "bf16":
        console.line("=> --loss-scale-value is ignored: bf16 has the range of fp32 and needs no scale")
    device.check_torch_options(
        args.device,
        deterministic=args.deterministic,
        profile=args.profile,
        compile_model=args.compile,
        grad_compress=args.grad_compress,
    )
    topology = resolve_topology(
        multiprocessing_distributed=args.multiprocessing_distributed,
        world_size=args.world_size,
        rank=args.rank,
        addr=args.addr,
        dist_url=args.dist_url,
        devices=len(args.device_list),
    )
    args.nodes, args.rank, args.processes = topology.nodes, topology.node_rank, topology.processes
    args.dist_url, args.multiprocessing_distributed = topology.dist_url, topology.spawn
    if args.device != "cpu" and args.processes > len(args.device_list):
        devices = len(args.device_list)
        raise UsageError(
            f"torchrun starts {args.processes} processes on {devices} devices: use --nproc-per-node {devices}"
        )
    if args.batch_size % args.processes:
        below = args.batch_size // args.processes * args.processes
        nearest = f"{below} or {below + args.processes}" if below else str(args.processes)
        raise UsageError(
            f"--batch-size {args.batch_size} is not divisible by {args.processes} processes: use {nearest}"
        )
    if args.workers is None:
        args.workers = device.default_workers(args.device, args.processes)
    for name in ("auto_augment", "random_erasing", "mixup", "cutmix"):
        if getattr(args, name):
            require_torchvision(f"--{name.replace('_', '-')}")
    if args.report and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--report requires matplotlib: pip install matplotlib")
    return topology


def make_output_folders(args: argparse.Namespace) -> None:
    """Make the folders that the run writes to. Raises UsageError if one cannot be written to."""
    check_folder("--output-dir", args.output_dir)
    if args.report:
        check_folder("--report", args.report)
    if args.predictions:
        check_file("--predictions", args.predictions)


# Flags that may differ between nodes.
PER_NODE = {"data", "workers", "output_dir", "resume", "pretrained", "gpu", "device_list", "rank", "addr", "dist_url"}


def shared_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return {flag: value} of the flags that must be the same on every node."""
    return {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in PER_NODE}


# --- for the weights and the data that were found ---------------------------------------------------------------------

# Flags that change the pixels of training images.
AUGMENTATION = ["crop_scale", "train_scale", "hflip", "color_shift"]
AUGMENTATION += ["auto_augment", "random_erasing", "mixup", "cutmix"]


def checkpoint_name(args: argparse.Namespace) -> str:
    """Return how messages name the checkpoint that is continued or evaluated."""
    return args.resume or (args.pretrained if args.evaluate else "the checkpoint")


def resolve_from_checkpoint(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Set --arch, --image-size and --val-split, as far as they are not given, to those of the checkpoint.

    Raises UsageError if it does not hold the weights of a VGG.
    """
    if checkpoint is None:
        args.arch = args.arch or DEFAULT_ARCH
        return
    if args.arch is None:
        path = checkpoint_name(args)
        args.arch = vgg.architecture_of(model_weights(checkpoint, path))
        if args.arch is None:
            raise UsageError(f"{path}: holds weights, but not those of a VGG")
    args.image_size = args.image_size or (checkpoint.get("preprocessing") or {}).get("image_size")
    if args.val_split is None and args.data and not is_split(args.data):
        args.val_split = checkpoint.get("val_split")


def resolve_preprocessing(
    args: argparse.Namespace, dataset: ImageDataset | None, checkpoint: dict[str, Any] | None
) -> dict[str, Any]:
    """Return how validation images become the model's input, and set --image-size if it is not known yet.

    An evaluation takes mean and standard deviation from the checkpoint. Synthetic images (no dataset) are treated like
    a folder's.
    """
    trained = (checkpoint or {}).get("preprocessing") or {} if args.evaluate else {}
    kind = ImageFolder if dataset is None else dataset
    args.image_size = args.image_size or kind.default_size
    preprocessing = preprocessing_of(kind, args.image_size)
    return {**preprocessing, **{key: trained[key] for key in ("mean", "std") if key in trained}}


def resolve_hflip(args: argparse.Namespace, dataset: ImageDataset) -> float:
    """Return the probability that an image is mirrored: --hflip, else the dataset's."""
    return dataset.default_hflip if args.hflip is None else args.hflip


def resolve_augmentation(args: argparse.Namespace, dataset: ImageDataset) -> Augmentation:
    """Return what training does to each image. Raises UsageError if the flags do not fit the data or this torch."""
    if not isinstance(dataset, ImageFolder) and (args.crop_scale or args.train_scale):
        raise UsageError("--crop-scale and --train-scale are for folders of images: leave them out")
    if args.train_scale and args.train_scale[0] < args.image_size:
        raise UsageError(
            f"--train-scale must be at least the crop, --image-size {args.image_size}, got {args.train_scale[0]}"
        )
    return Augmentation(
        crop_scale=args.crop_scale or CROP_SCALE,
        train_scale=args.train_scale,
        hflip=resolve_hflip(args, dataset),
        color_shift=args.color_shift,
        auto_augment=args.auto_augment,
        random_erasing=args.random_erasing,
        fill=tuple(round(255 * mean) for mean in dataset.mean),
    )


def resolve_scales(args: argparse.Namespace, dataset: ImageDataset) -> list[int]:
    """Return the short sides of the whole images that an evaluation's views are taken from; none for the default."""
    if not args.eval_scales and args.eval_view == "center":
        return []
    scales = args.eval_scales or [default_scale(args.image_size) if dataset.center_crop else args.image_size]
    if min(scales) < args.image_size:
        raise UsageError(f"--eval-scales must be at least the crop, --image-size {args.image_size}, got {min(scales)}")
    return scales


def keep_images_per_step(
    args: argparse.Namespace, checkpoint: dict[str, Any] | None, log: Callable[[str], None]
) -> dict[str, int]:
    """Keep the images per step if only the number of nodes has changed since a checkpoint, with more batches per step.

    If they do not divide evenly, scale the learning rates (Goyal et al., arXiv:1706.02677, section 2.1). Changes args,
    and returns what a checkpoint holds of it.
    """
    saved = (checkpoint or {}).get("batch") or {}
    flags = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
    own = args.batch_size * args.nodes
    wanted = saved["images_per_step"] if saved and flags.items() <= saved.items() else own * args.accum_steps
    if wanted != own * args.accum_steps and not args.evaluate:
        nodes = f"{args.nodes} {'node' if args.nodes == 1 else 'nodes'}"
        if wanted % own == 0:
            args.accum_steps = wanted // own
            log(f"=> resized to {nodes}: {args.accum_steps} batches per step, so a step still has {wanted:,} images")
        else:
            factor = own * args.accum_steps / wanted
            args.lr, args.min_lr = args.lr * factor, args.min_lr * factor
            now = f"{own * args.accum_steps:,} images per step in place of {wanted:,}"
            log(f"=> resized to {nodes}: {now}, so learning rates are multiplied by {factor:.4g}")
    return {**flags, "images_per_step": wanted}


def resolve_identity(args: argparse.Namespace, train_set: ImageDataset | None) -> dict[str, Any]:
    """Return what must be the same to continue within an epoch."""
    identity = {
        "seed": args.seed,
        "global batch": args.batch_size * args.nodes * args.accum_steps,
        "data": train_set.fingerprint if train_set is not None else "dummy",
        "image size": args.image_size,
    }
    # Older checkpoints have no entry, and mean the defaults.
    defaults: dict[str, Any] = {"crop_scale": list(CROP_SCALE), "random_erasing": 0, "mixup": 0, "cutmix": 0}
    if train_set is not None:
        defaults["hflip"] = train_set.default_hflip
    flags = {name: getattr(args, name) for name in AUGMENTATION}
    changed = {name: value for name, value in flags.items() if value not in (None, defaults.get(name))}
    given = [f"{name} {value}" for name, value in changed.items() if value is not False]
    if given:
        identity["augmentation"] = ", ".join(given)
    return identity
