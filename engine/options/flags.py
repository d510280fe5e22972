# SPDX-License-Identifier: BSD-3-Clause
"""The flags of main.py, their defaults, and which of them exclude each other."""

from __future__ import annotations

import argparse
import os
from typing import Sequence

import vgg
from engine.data.augmentation import AUTO_AUGMENT, CROP_SCALE
from engine.evaluation.views import VIEWS
from engine.options.parser import OneLineParser, device_list, loss_scale, nonempty_path, number

DEVICES = ["auto", "npu", "gpu", "cuda", "mps", "cpu"]
DEVICE_HELP = "what to run on (default: the first of npu, gpu, mps, cpu that works)"
# Defaults that learn on the embedded digits: 1,438 images are too few for ImageNet's.
DIGITS_DEFAULTS = {"batch_size": 64, "epochs": 16, "lr": 0.05, "clip_grad_norm": 1.0, "eval_freq": 4}
DIGITS_WARMUP_EPOCHS = 2
MAX_SIDE = 4096  # pixels: a mistyped size should not look like a lack of memory


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of main.py, after every check that needs no device. Exits with 2 if one fails."""
    parser = _build_parser()
    args = parser.parse_args(argv)
    if not (args.dir or args.data or args.dummy):
        parser.set_defaults(**DIGITS_DEFAULTS)
        args = parser.parse_args(argv)
        if args.warmup_epochs is None:
            args.warmup_epochs = min(DIGITS_WARMUP_EPOCHS, args.epochs - 1)
    args.warmup_epochs = args.warmup_epochs or 0
    if args.dir and args.data and os.path.abspath(args.dir) != os.path.abspath(args.data):
        parser.error(f"DIR {args.dir} and --data {args.data} are different folders: give one of them")
    args.data = args.data or args.dir
    del args.dir
    args.device = "gpu" if args.device == "cuda" else args.device
    _check_combinations(parser, args)
    return args


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        "main.py",
        "Train VGG on ImageNet, CIFAR-10 or a folder of images, on an NPU, a GPU or a CPU. @FILE reads flags from "
        "FILE. The defaults shown are ImageNet's; docs/reference.md has those of the embedded digits.",
        files=True,
    )
    default = "(default: %(default)s)"
    data = parser.add_argument_group("data")
    data.add_argument("dir", type=nonempty_path, metavar="DIR", nargs="?", help="the same as --data")
    data.add_argument(
        "--data", type=nonempty_path, help="folder with train/ and val/, or CIFAR-10 (default: the embedded digits)"
    )
    data.add_argument(
        "-j",
        "--j",
        "--workers",
        dest="workers",
        type=number(int, 0),
        metavar="N",
        help="DataLoader workers of this node, shared by its processes (default: the cores they leave; on a CPU 0)",
    )
    data.add_argument(
        "--image-size",
        type=number(int, 32, MAX_SIDE),
        metavar="S",
        help="pixels per side (default: 224; CIFAR-10 and digits: 32; of a checkpoint: its own)",
    )
    data.add_argument(
        "--val-split",
        type=number(float, above=0, below=1),
        metavar="SHARE",
        help="for a folder of classes without train/ and val/: the share of images used for validation, such as 0.1",
    )
    data.add_argument(
        "--bad-images",
        default="error",
        choices=["error", "skip"],
        help=f"unreadable images: stop at the first, or check all once and leave them out {default}",
    )
    data.add_argument(
        "--dummy",
        type=number(int, 1),
        nargs="?",
        const=1281167,
        metavar="N",
        help="N synthetic images made on the device, to measure throughput (default N: %(const)s)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "-a",
        "--arch",
        choices=vgg.ARCHITECTURES,
        metavar="NAME",
        help="vgg11, vgg13, vgg16 or vgg19, each also with _bn (default: that of the checkpoint, else vgg16)",
    )
    model.add_argument(
        "--pretrained",
        type=nonempty_path,
        metavar="PATH",
        help="weights to start from: ours, torchvision's, ModelZoo's, *.safetensors; imagenet: downloads torchvision's",
    )
    model.add_argument(
        "--freeze-features",
        action="store_true",
        help="train only the classifier, on the features of --pretrained or --resume",
    )

    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=number(int, 1), default=90, metavar="N", help=default)
    train.add_argument("--start-epoch", type=number(int, 0), default=0, metavar="N", help=default)
    train.add_argument(
        "-b",
        "--batch-size",
        type=number(int, 1),
        default=256,
        metavar="N",
        help=f"images per step on this node, over all its devices {default}",
    )
    train.add_argument(
        "--accum-steps", type=number(int, 1), default=1, metavar="N", help=f"batches of -b per optimizer step {default}"
    )
    train.add_argument(
        "--lr",
        "--learning-rate",
        type=number(float, 0),
        default=0.01,
        metavar="RATE",
        help=f"peak learning rate; cosine to --min-lr, by epoch {default}",
    )
    train.add_argument("--min-lr", type=number(float, 0), default=0.0, metavar="RATE", help=default)
    train.add_argument(
        "--warmup-epochs",
        type=number(int, 0),
        metavar="N",
        help="epochs of linear warm-up before the cosine (default: 0)",
    )
    train.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="M", help=default)
    train.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), default=1e-4, metavar="W", help=default
    )
    train.add_argument("--label-smoothing", type=number(float, 0, 1), default=0.0, metavar="S", help=default)
    train.add_argument(
        "--clip-grad-norm",
        type=number(float, above=0),
        metavar="NORM",
        help="largest norm of all gradients together (default: no limit)",
    )
    train.add_argument(
        "--ema-decay",
        type=number(float, 0, below=1),
        default=0.0,
        metavar="DECAY",
        help="keep an EMA of the weights, such as 0.9999, and validate it (default: off)",
    )
    train.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=49, help=default)
    train.add_argument("--stop-step-num", type=number(int, 1), metavar="N", help="end cleanly after N steps in all")

    train.add_argument(
        "--no-bias-decay", action="store_true", help="no weight decay for biases and batch norm (default: for all)"
    )

    augment = parser.add_argument_group("augmentation")
    augment.add_argument(
        "--crop-scale",
        type=number(float, above=0, at_most=1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help=f"random crops of a folder's images: share of the area (default: {CROP_SCALE[0]} {CROP_SCALE[1]:g})",
    )
    augment.add_argument(
        "--train-scale",
        type=number(int, 32, MAX_SIDE),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="instead of --crop-scale: resize the short side to a random length in pixels, then crop (paper: 256 512)",
    )
    augment.add_argument(
        "--hflip",
        type=number(float, 0, 1),
        metavar="P",
        help="probability of a horizontal flip (default: 0.5; digits: 0)",
    )
    augment.add_argument("--color-shift", action="store_true", help="the paper's random shift of all pixels' color")
    augment.add_argument(
        "--auto-augment",
        choices=list(AUTO_AUGMENT),
        help="TrivialAugmentWide, RandAugment or AutoAugment (torchvision, torch 2.1)",
    )
    augment.add_argument(
        "--random-erasing",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help="probability that a rectangle is erased (torchvision, torch 2.1; default: 0)",
    )
    for flag, what in (("--mixup", "blend each image with another"), ("--cutmix", "paste a part of another image")):
        augment.add_argument(
            flag,
            type=number(float, 0),
            default=0.0,
            metavar="ALPHA",
            help=f"{what}; training accuracy is then of the larger part (torchvision, torch 2.1; default: 0, off)",
        )

    run = parser.add_argument_group("evaluating, resuming, recording")
    run.add_argument(
        "-e",
        "--e",
        "--evaluate",
        dest="evaluate",
        action="store_true",
        help="evaluate the weights of --resume or --pretrained, write metrics.json to --output-dir and exit",
    )
    run.add_argument(
        "--eval-view",
        default="center",
        choices=VIEWS,
        help="with -e, as in the VGG paper: the center crop; ten crops; all positions of the whole image (their logits "
        "are averaged); 50 crops per scale. Softmax outputs are averaged over crops, scales and mirror images "
        f"{default}",
    )
    run.add_argument(
        "--eval-scales",
        type=number(int, 32, MAX_SIDE),
        nargs="+",
        metavar="Q",
        help="with -e: short sides of the images in pixels, such as 256 384 512 (default: 256/224 of --image-size; "
        "CIFAR-10 and digits: --image-size)",
    )
    run.add_argument(
        "--predictions",
        type=nonempty_path,
        metavar="FILE.csv",
        help="with -e: also write the predictions for each image",
    )
    run.add_argument("--report", type=nonempty_path, metavar="DIR", help="with -e: also write a page, DIR/index.html")
    run.add_argument(
        "--eval-freq",
        type=number(int, 1),
        default=1,
        metavar="N",
        help=f"epochs between validations; the last epoch always validates {default}",
    )
    run.add_argument(
        "-p",
        "--p",
        "--print-freq",
        dest="print_freq",
        type=number(int, 1),
        default=10,
        metavar="N",
        help=f"steps between log lines {default}",
    )
    run.add_argument("--resume", type=nonempty_path, metavar="PATH", help="checkpoint to continue")
    run.add_argument(
        "--auto-resume",
        action="store_true",
        help="continue from the newest intact checkpoint in --output-dir; start fresh only if there is none at all",
    )
    run.add_argument(
        "--save-freq",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="also save every N steps (default: at the end of epochs only)",
    )
    run.add_argument(
        "--output-dir",
        type=nonempty_path,
        default=".",
        metavar="DIR",
        help="checkpoints, metrics, curves (default: here)",
    )
    run.add_argument(
        "--profile",
        action="store_true",
        help="write trace.json to --output-dir: ten steps after five of warm-up, on rank 0",
    )

    device = parser.add_argument_group("device and precision")
    device.add_argument("--device", default="auto", choices=DEVICES, help=DEVICE_HELP)
    device.add_argument(
        "--gpu",
        "--gup",
        dest="gpu",
        type=number(int, 0),
        metavar="N",
        help="the one device to use: an index into --device-list if that is given, else its number",
    )
    device.add_argument("--amp", action="store_true", help="mixed precision")
    device.add_argument(
        "--opt-level",
        default="O1",
        choices=["O0", "O1", "O2", "O3"],
        help="with --amp: O0 fp32, O1 autocast, O2 half-precision weights with fp32 master weights, "
        f"O3 pure half precision {default}",
    )
    device.add_argument(
        "--amp-dtype",
        default="auto",
        choices=["auto", "fp16", "bf16"],
        help="format of --amp (default: bf16 if the device supports it natively, else fp16)",
    )
    device.add_argument(
        "--loss-scale-value",
        type=loss_scale,
        metavar="SCALE",
        help="loss scale in fp16: a number, or dynamic (default: 1024)",
    )
    device.add_argument("--deterministic", action="store_true", help="bitwise repeatable on a GPU too, and slower")
    device.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the training step (torch 2, gpu and cpu; requires a C++ compiler)",
    )

    parallel = parser.add_argument_group("several devices, several nodes")
    parallel.add_argument(
        "--multiprocessing-distributed", action="store_true", help="one process per device of --device-list"
    )
    parallel.add_argument(
        "--device-list",
        type=device_list,
        metavar="0,1,…",
        help="device numbers (default: all); on a CPU its length is the number of processes",
    )
    parallel.add_argument(
        "--world-size",
        type=number(int, -1),
        default=-1,
        metavar="N",
        help="nodes with --multiprocessing-distributed, else processes (default: one)",
    )
    parallel.add_argument("--rank", type=number(int, -1), default=-1, metavar="N", help="rank of this node, from 0")
    parallel.add_argument("--addr", default="127.0.0.1", help=f"address of the node of rank 0 {default}")
    parallel.add_argument(
        "--dist-url", metavar="URL", help="rendezvous (default: tcp://ADDR:PORT; env:// under torchrun)"
    )
    parallel.add_argument(
        "--rendezvous-timeout",
        type=number(int, 1),
        default=600,
        metavar="SECONDS",
        help=f"how long to wait for other nodes {default}",
    )
    parallel.add_argument(
        "--dist-backend", choices=["hccl", "nccl", "gloo"], help="of the gradients (default: by device)"
    )
    parallel.add_argument(
        "--grad-compress",
        default="none",
        choices=["none", "bf16", "fp16"],
        help="format of the gradients on the network (torch 2; default: that of the weights)",
    )
    return parser


def _check_combinations(parser: OneLineParser, args: argparse.Namespace) -> None:
    if args.evaluate and not (args.resume or args.pretrained):
        parser.error("--evaluate requires weights: --resume PATH or --pretrained PATH")
    for flag, given in (
        ("--report", args.report),
        ("--predictions", args.predictions),
        ("--eval-view", args.eval_view != "center"),
        ("--eval-scales", args.eval_scales),
    ):
        if given and not args.evaluate:
            parser.error(f"{flag} requires --evaluate")
    if args.crop_scale and args.train_scale:
        parser.error("--crop-scale cannot be combined with --train-scale: give one of them")
    for flag, bounds in (("--crop-scale", args.crop_scale), ("--train-scale", args.train_scale)):
        if bounds and bounds[0] > bounds[1]:
            parser.error(f"{flag}: MIN must be at most MAX, got {bounds[0]} {bounds[1]}")
    if args.freeze_features and not (args.pretrained or args.resume):
        parser.error("--freeze-features requires --pretrained PATH or --resume PATH: otherwise the features are random")
    if args.dummy and (args.data or args.evaluate or args.val_split):
        parser.error("--dummy cannot be combined with --data, --val-split or --evaluate: leave one of them out")
    if args.evaluate and args.auto_resume:
        parser.error("--evaluate cannot be combined with --auto-resume: name the checkpoint with --resume")
    if args.val_split and not args.data:
        parser.error("--val-split requires --data DIR, a folder of classes")
    if args.resume and args.auto_resume:
        parser.error("--resume cannot be combined with --auto-resume: give one of them")
    for flag, file in (("--resume", args.resume), ("--pretrained", args.pretrained)):
        reads = args.rank <= 0 and os.environ.get("RANK", "0") == "0"  # only rank 0 does
        if file and reads and not os.path.isfile(file) and (flag, file) != ("--pretrained", "imagenet"):
            parser.error(
                f"{flag} {file}: {'expected a file, this is a folder' if os.path.isdir(file) else 'no such file'}"
            )
    if args.data and not os.path.isdir(args.data):
        parser.error(f"--data {args.data}: {'expected a folder' if os.path.exists(args.data) else 'no such folder'}")
    if args.world_size == 0:
        parser.error("--world-size must be at least 1, got 0")
    if args.min_lr > args.lr:
        parser.error(f"--min-lr must be at most --lr {args.lr}, got {args.min_lr}")
    for flag, epochs in (("--start-epoch", args.start_epoch), ("--warmup-epochs", args.warmup_epochs)):
        if epochs >= args.epochs:
            parser.error(f"{flag} must be less than --epochs {args.epochs}, got {epochs}")
