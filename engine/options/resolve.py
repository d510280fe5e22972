# SPDX-License-Identifier: BSD-3-Clause
"""What the flags mean: on this machine (before anything starts), and for the checkpoint and the data that were found.

A resolver returns values; nothing changes the flags of a run that has started.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import tempfile
from typing import Any, Sequence
from zlib import crc32

from engine import console
from engine.checkpoints import Checkpoint, RunInfo
from engine.data import Augmentation, ImageDataset, Preprocessing
from engine.device import (
    check_torch_options,
    default_workers,
    needs_apex,
    resolve_backend,
    resolve_device,
    resolve_device_list,
    resolve_precision,
)
from engine.errors import UsageError, counted
from engine.evaluation import check_predictions
from engine.options.batch_size import check_batch_size, default_batch_size, keep_images_per_step
from engine.options.class_weights import resolve_class_weights
from engine.options.flags import AUGMENTATION, SMALL, complete_defaults, parse_args, schedule_conflicts
from engine.parallel import Topology, resolve_topology, under_torchrun
from engine.parser import check_file, check_folder

import vgg

SMALL_LIMIT = 100_000  # training images; CIFAR has 50,000


def parse_flags(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Topology]:
    """Return the flags of main.py, resolved for this machine, and the topology. Raises UserError, or exits with 2."""
    return resolve_flags(parse_args(argv))


def resolve_flags(args: argparse.Namespace) -> tuple[argparse.Namespace, Topology]:
    """Return the flags with what depends on this machine, such as the device and the precision, and the topology.

    Makes the folders that the run writes to. Raises UsageError or DeviceUnavailableError.
    """
    args = argparse.Namespace(**vars(args))
    _resolve_device(args)
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
    _resolve_backend(args)
    _check_processes(args)
    if args.workers is None:
        args.workers = default_workers(args.device, args.processes)
    missing = [name for name in ("matplotlib", "jinja2") if args.report and importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--report requires {' and '.join(missing)}: pip install {' '.join(missing)}")
    check_folder("--output-dir", args.output_dir)
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # TMPDIR, /tmp, /var/tmp and this folder are read-only, and torch wants one
        os.environ["TMPDIR"] = os.path.abspath(args.output_dir)
    if args.report:
        check_folder("--report", args.report)
    if args.predictions:
        check_file("--predictions", args.predictions)
        check_predictions(args.predictions)
    return args, topology


def _resolve_device(args: argparse.Namespace) -> None:
    wanted, (args.device, count) = args.device, resolve_device(args.device)
    if args.gpu is not None and (wanted, args.device) == ("auto", "cpu"):
        console.warning(
            f"--gpu {args.gpu}: no NPU or GPU works here, so this runs on the CPU; --device gpu or npu says why"
        )
    one_device = not (args.multiprocessing_distributed or under_torchrun())
    args.device_list = resolve_device_list(args.device_list, args.gpu, args.device, count, one_device=one_device)
    args.precision = resolve_precision(
        args.device, args.device_list, amp=args.amp, opt_level=args.opt_level, amp_dtype=args.amp_dtype
    )
    if args.loss_scale_value == "dynamic" and args.precision == "fp16" and needs_apex(args.device):
        raise UsageError("--loss-scale-value dynamic is not supported with apex: give a number")
    if args.loss_scale_value is not None and args.precision == "bf16":
        console.line("=> --loss-scale-value is ignored: bf16 has the range of fp32 and needs no scale")
    transforms = ("auto_augment", "random_erasing", "mixup", "cutmix")
    check_torch_options(
        args.device,
        deterministic=args.deterministic,
        profile=args.profile,
        compile_model=args.compile,
        grad_compress=args.grad_compress,
        transforms=[f"--{name.replace('_', '-')}" for name in transforms if getattr(args, name)],
    )


def _resolve_backend(args: argparse.Namespace) -> None:
    sends_bf16 = ""
    if args.nodes * args.processes > 1:
        if args.grad_compress == "bf16":
            sends_bf16 = "--grad-compress bf16"
        elif args.precision == "bf16" and args.opt_level in ("O2", "O3"):
            sends_bf16 = f"--opt-level {args.opt_level} in bf16"
    args.dist_backend = resolve_backend(args.dist_backend, args.device, sends_bf16)
    if len(set(args.device_list)) < len(args.device_list) and args.dist_backend != "gloo":
        raise UsageError("--device-list names a device twice: processes share one only with --dist-backend gloo")


def _check_processes(args: argparse.Namespace) -> None:
    if args.device != "cpu" and args.processes > len(args.device_list):
        devices = len(args.device_list)
        started = f"{counted(args.processes, 'process')} on {counted(devices, 'device')}"
        raise UsageError(f"torchrun starts {started}: use --nproc-per-node {devices}")
    if "batch_size" not in args.left_open:  # else with_checkpoint does it
        check_batch_size(args)


# Flags that may differ between nodes.
PER_NODE = {"data", "workers", "output_dir", "resume", "pretrained", "gpu", "device_list", "rank", "addr", "dist_url"}


def shared_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Return {flag: value} of the flags that must be the same on every node."""
    names = {name: f"--{name.replace('_', '-')}" for name in vars(args) if name not in PER_NODE}
    names["left_open"] = "the flags that are left to their defaults"
    return {shown: getattr(args, name) for name, shown in names.items()}


# --- for the checkpoint and the data that were found ------------------------------------------------------------------


def with_checkpoint(
    args: argparse.Namespace,
    start: Checkpoint | None,
    images: int = 0,
    size: int = Preprocessing.image_size,
    memory: float = math.inf,
    pretrained: Checkpoint | None = None,
) -> tuple[argparse.Namespace, dict[str, int]]:
    """Return the flags completed by the checkpoint that a run continues or evaluates, and RunInfo.batch.

    --arch, --head and --batch-size are the checkpoint's as far as they are not given, but see default_batch_size;
    --arch and --head are also those of pretrained weights. If only the number of nodes has changed, a step keeps its
    images, by more batches per step; if they do not divide evenly, the learning rates are scaled (Goyal et al.,
    arXiv:1706.02677, section 2.1).
    Few images, trained from scratch, get the defaults SMALL in place of ImageNet's, unless --lr or a network without
    batch norm is given; so does a run that continues such a run.
    images: of the training set, of `size` pixels per side; 0 for an evaluation. memory: bytes of a node.
    Raises UsageError if the checkpoint holds no weights of a VGG, or its batch or the schedule does not fit the run.
    """
    args = argparse.Namespace(**vars(args))
    left_open = vars(args).pop("left_open")
    source = start or pretrained
    if source is not None:
        args.arch = args.arch or vgg.architecture_of(source.weights)
        args.head = args.head or vgg.head_of(source.weights)
        if args.arch is None:
            raise UsageError(f"{source.path}: holds {vgg.describe_weights(source.weights)}")
        left_open = [name for name in left_open if name not in ("arch", "head")]
    if start is not None:
        args.small_defaults = start.info.small_defaults and not args.evaluate
    else:
        args.small_defaults = pretrained is None and _takes_small_defaults(args, left_open, images)
    if args.small_defaults:
        complete_defaults(args, SMALL, left_open)
    if "batch_size" in left_open:
        if start is not None and not args.evaluate:
            args.batch_size = start.info.batch.get("batch_size", args.batch_size)
        elif args.data or args.dummy:
            args.batch_size = default_batch_size(args, images, size, memory)
        check_batch_size(args)
    args.arch, args.head = args.arch or "vgg16", args.head or "paper"
    batch = {"batch_size": args.batch_size, "accum_steps": args.accum_steps}
    images_per_step = args.batch_size * args.nodes * args.accum_steps
    if start is not None and batch.items() <= start.info.batch.items():
        images_per_step = start.info.batch["images_per_step"]
    if args.small_defaults and "lr" in left_open:
        args.lr *= min(images_per_step, 512) / SMALL["batch_size"]
    if args.small_defaults and start is None:
        values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in SMALL if name in left_open}
        console.line(f"=> few images: {' '.join(f'{flag} {value}' for flag, value in values.items())}, as in recipes/")
    for conflict in schedule_conflicts(args):
        raise UsageError(conflict)
    if not args.evaluate:
        keep_images_per_step(args, images_per_step)
    return args, {**batch, "images_per_step": images_per_step}


def _takes_small_defaults(args: argparse.Namespace, left_open: Sequence[str], images: int) -> bool:
    """Whether a new run takes the defaults for few images."""
    has_batch_norm = args.arch is None or args.arch.endswith("_bn")
    return bool(args.data and 0 < images < SMALL_LIMIT and "lr" in left_open and has_batch_norm)


def resolve_preprocessing(
    args: argparse.Namespace, dataset: ImageDataset | None, start: Checkpoint | None
) -> Preprocessing:
    """Return how validation images become the model's input.

    The size is the checkpoint's if --image-size is not given; an evaluation takes mean, standard deviation and
    --exif-rotate from it too. Synthetic images (no dataset) are treated like a folder's. Raises UsageError.
    """
    preprocessing = Preprocessing() if dataset is None else dataset.preprocessing
    if args.exif_rotate and not preprocessing.crop:
        raise UsageError("--exif-rotate is for folders of images: leave it out")
    saved = {} if start is None else start.info.preprocessing
    size = args.image_size or saved.get("image_size") or preprocessing.image_size
    values = {**preprocessing.to_dict(), "image_size": size, "exif_rotate": args.exif_rotate}
    if args.evaluate:
        values.update({key: saved[key] for key in ("mean", "std") if key in saved})
        values["exif_rotate"] = args.exif_rotate or saved.get("exif_rotate", False)
    return Preprocessing.from_dict(values)


def resolve_augmentation(args: argparse.Namespace, dataset: ImageDataset, size: int) -> Augmentation:
    """Return what training does to each image. Raises UsageError if the flags do not fit the data or this torch."""
    if not dataset.preprocessing.crop and (args.crop_scale or args.train_scale):
        raise UsageError("--crop-scale and --train-scale are for folders of images: leave them out")
    if args.train_scale and args.train_scale[0] < size:
        raise UsageError(f"--train-scale must be at least the crop, --image-size {size}, got {args.train_scale[0]}")
    return Augmentation(
        size,
        crop_scale=args.crop_scale,
        train_scale=args.train_scale,
        hflip=dataset.default_hflip if args.hflip is None else args.hflip,
        color_shift=args.color_shift,
        auto_augment=args.auto_augment,
        random_erasing=args.random_erasing,
        fill=tuple(round(255 * mean) for mean in dataset.preprocessing.mean),
        exif_rotate=args.exif_rotate,
    )


def resolve_views(
    args: argparse.Namespace, preprocessing: Preprocessing, dataset: ImageDataset
) -> tuple[Sequence[int], bool]:
    """Return the short sides of the whole images that an evaluation's views are taken from, none for the default.

    Also whether mirror images are views too.
    """
    mirrored = (dataset.default_hflip if args.hflip is None else args.hflip) > 0
    if not args.eval_scales and args.eval_view == "center":
        return [], mirrored
    scales = args.eval_scales or [preprocessing.short_side]
    if min(scales) < preprocessing.image_size:
        raise UsageError(
            f"--eval-scales must be at least the crop, --image-size {preprocessing.image_size}, got {min(scales)}"
        )
    return scales, mirrored


def describe_run(
    args: argparse.Namespace,
    batch: dict[str, int],
    preprocessing: Preprocessing,
    train_set: ImageDataset | None,
    val_set: ImageDataset | None,
) -> RunInfo:
    """Return what a checkpoint holds of a run besides its state, and what must agree to continue it."""
    identity = {
        "seed": args.seed,
        "data": train_set.fingerprint if train_set is not None else "dummy",
        "image size": preprocessing.image_size,
    }
    # Older checkpoints have no entry, and mean the defaults.
    defaults: dict[str, Any] = {**AUGMENTATION, "crop_scale": list(Augmentation.CROP_SCALE)}
    if train_set is not None:
        defaults["hflip"] = train_set.default_hflip
    flags = {name: getattr(args, name) for name in AUGMENTATION}
    changed = {name: value for name, value in flags.items() if value not in (None, defaults.get(name))}
    given = [f"{name} {value}" for name, value in changed.items() if value is not False]
    if given:
        identity["augmentation"] = ", ".join(given)
    if preprocessing.exif_rotate:
        identity["--exif-rotate"] = True
    if args.features_lr != 1:
        identity["--features-lr"] = args.features_lr
    rows = args.class_weights
    if rows:
        identity["--class-weights"] = rows if rows == "auto" else f"a file (CRC {crc32(repr(rows).encode()):08x})"
    weights = None if train_set is None else resolve_class_weights(rows, train_set.classes, train_set.labels)
    return RunInfo(
        args.arch,
        val_set.classes if val_set is not None else [str(number) for number in range(1000)],
        preprocessing.to_dict(),
        args.nodes * args.processes,
        images_per_step=args.batch_size * args.nodes * args.accum_steps,
        small_defaults=args.small_defaults,
        val_split=None if val_set is None else val_set.val_split,
        identity=identity,
        batch=batch,
        class_weights=weights,
        decoder=Augmentation.decoder,
    )
