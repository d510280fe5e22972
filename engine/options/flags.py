# SPDX-License-Identifier: BSD-3-Clause
"""The flags of main.py, their defaults, and which of them exclude each other. docs/reference.md says more of each."""

from __future__ import annotations

import argparse
import os
from typing import Any, Callable, Mapping, Sequence

from engine.data import Augmentation
from engine.evaluation import VIEWS
from engine.options.class_weights import class_weights
from engine.parser import OneLineParser, device_list, loss_scale, nonempty_path, number

import vgg

# Defaults by what is trained on; another set may name only those of ImageNet's that it changes.
DEFAULTS = {
    "arch": None,  # that of a checkpoint, else vgg16
    "head": None,  # that of a checkpoint, else the paper's
    "batch_size": 256,
    "epochs": 90,
    "lr": 0.01,
    "lr_schedule": None,
    "warmup_epochs": 0,
    "weight_decay": 1e-4,
    "label_smoothing": 0.0,
    "clip_grad_norm": None,
    "ema_decay": 0.0,
    "eval_freq": 1,
}
# 1,438 images are too few for those.
DIGITS = {"batch_size": 64, "epochs": 16, "lr": 0.05, "warmup_epochs": 2, "clip_grad_norm": 1.0, "eval_freq": 4}
# So are the images of CIFAR-10 or a folder of one's own: see with_checkpoint. The learning rate is that for 128 images
# per step.
SMALL = {
    "arch": "vgg16_bn",
    "head": "linear",
    "batch_size": 128,
    "epochs": 30,
    "lr": 0.1,
    "lr_schedule": "onecycle",
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "clip_grad_norm": 2.0,
    "ema_decay": 0.995,
}
DEFAULT = "(default: %(default)s)"
DEVICES = ["auto", "npu", "gpu", "cuda", "mps", "cpu"]
DEVICE_FLAG: dict[str, Any] = {
    "default": "auto",
    "choices": DEVICES,
    "help": "what to run on (default: the first of npu, gpu, mps, cpu that works)",
}
LISTS = (".csv", ".tsv", ".txt")  # lists of images
MAX_SIDE = 4096  # pixels: a mistyped size should not look like a lack of memory

# What several flags take.
PATH = {"type": nonempty_path, "metavar": "PATH"}
FOLDER = {"type": nonempty_path, "metavar": "DIR"}
SWITCH = {"action": "store_true"}
COUNT = {"type": number(int, 1), "metavar": "N"}
FROM_0 = {"type": number(int, 0), "metavar": "N"}
RANK = {"type": number(int, -1), "metavar": "N", "default": -1}
SIDE = number(int, 32, MAX_SIDE)
POSITIVE = number(float, above=0)
SHARE = number(float, 0, 1)
RANGE: dict[str, Any] = {"nargs": 2, "metavar": ("MIN", "MAX")}
ALPHA: dict[str, Any] = {"type": number(float, 0), "metavar": "ALPHA", "default": 0.0}

CROPS = "share of a folder's image that a random crop takes (default: 0.08 1)"
JITTER = "instead of --crop-scale: resize the short side to a random length, then crop (paper: 256 512)"
ERASE = "probability that a rectangle is erased (default: 0)"
# All that changes training images: the parser, the identity of a run and a test of docs/reference.md read this table.
AUGMENTATION_FLAGS: dict[str, dict[str, Any]] = {
    "--crop-scale": {**RANGE, "type": number(float, above=0, at_most=1), "help": CROPS},
    "--train-scale": {**RANGE, "type": SIDE, "help": JITTER},
    "--hflip": {"type": SHARE, "metavar": "P", "help": "probability of a horizontal flip (default: 0.5; digits: 0)"},
    "--color-shift": {**SWITCH, "help": "the paper's random shift of all pixels' color"},
    "--auto-augment": {
        "choices": list(Augmentation.POLICIES),
        "help": "TrivialAugmentWide, RandAugment or AutoAugment",
    },
    "--random-erasing": {"type": SHARE, "metavar": "P", "default": 0.0, "help": ERASE},
    "--mixup": {**ALPHA, "help": "blend each image with another (default: 0, off)"},
    "--cutmix": {**ALPHA, "help": "paste a part of another image (default: 0, off)"},
}
# {name in the namespace: default}
AUGMENTATION = {flag[2:].replace("-", "_"): options.get("default") for flag, options in AUGMENTATION_FLAGS.items()}

Add = Callable[..., argparse.Action]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the flags of main.py, after every check that needs no device. Exits with 2 if one fails."""
    parser = build_parser()
    # Of the flags with several defaults, those that are not given stay None until complete_defaults.
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(DEFAULTS)))
    if args.dir and args.data and os.path.abspath(args.dir) != os.path.abspath(args.data):
        parser.error(f"DIR {args.dir} and --data {args.data} are different folders: give one of them")
    args.data = args.data or args.dir
    del args.dir
    args.device = "gpu" if args.device == "cuda" else args.device
    args.left_open = [name for name in DEFAULTS if getattr(args, name) is None]  # completed again by with_checkpoint
    complete_defaults(args, {} if args.data or args.dummy else DIGITS, args.left_open)
    args.small_defaults = False
    lr_is_known = "lr" not in args.left_open or not args.data
    for conflict in _conflicts(args) + schedule_conflicts(args, lr_is_known=lr_is_known):
        parser.error(conflict)
    return args


def complete_defaults(args: argparse.Namespace, changed: Mapping[str, Any], left_open: Sequence[str]) -> None:
    """Set the flags named in left_open. changed: those whose default differs from ImageNet's."""
    defaults: dict[str, Any] = {**DEFAULTS, **changed}
    vars(args).update({name: defaults[name] for name in left_open if name != "warmup_epochs"})
    if "warmup_epochs" in left_open:
        wanted = round(0.3 * args.epochs) if args.lr_schedule == "onecycle" else defaults["warmup_epochs"]
        args.warmup_epochs = min(wanted, args.epochs - 1)


def build_parser() -> OneLineParser:
    about = (
        "Train VGG on ImageNet, CIFAR or a folder of images, on an NPU, a GPU or a CPU. @FILE reads flags from FILE. "
        "The defaults shown are ImageNet's; docs/reference.md has those of few images and of the embedded digits."
    )
    parser = OneLineParser("main.py", about, files=True)
    _add_data(parser.add_argument_group("data").add_argument)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    augmentation = parser.add_argument_group("augmentation")
    for flag, options in AUGMENTATION_FLAGS.items():
        augmentation.add_argument(flag, **options)
    _add_run(parser.add_argument_group("evaluating, resuming, recording").add_argument)
    _add_device(parser.add_argument_group("device and precision").add_argument)
    _add_parallel(parser.add_argument_group("several devices, several nodes").add_argument)
    parser.set_defaults(**DEFAULTS)
    return parser


def _add_data(add: Add) -> None:
    add("dir", **FOLDER, nargs="?", help="the same as --data")
    data = "folder with train/ and val/, CIFAR, or a list of images (default: the embedded digits)"
    add("--data", type=nonempty_path, help=data)
    workers = "DataLoader workers of this node, shared by its processes (default: the cores they leave; on a CPU 0)"
    add("-j", "--j", "--workers", dest="workers", **FROM_0, help=workers)
    size = "pixels per side (default: 224; CIFAR and digits: 32; of a checkpoint: its own)"
    add("--image-size", type=SIDE, metavar="S", help=size)
    split = "for a folder of classes, or a list, that is not split: the share of images for validation, such as 0.1"
    add("--val-split", type=number(float, above=0, below=1), metavar="SHARE", help=split)
    bad_images = f"unreadable images: stop at the first, or check all once and leave them out {DEFAULT}"
    add("--bad-images", default="error", choices=["error", "skip"], help=bad_images)
    add("--exif-rotate", **SWITCH, help="turn images upright, as their EXIF data says (default: as they are stored)")
    add("--dummy", **COUNT, nargs="?", const=1281167, help="N synthetic images, to measure (default N: %(const)s)")


def _add_model(add: Add) -> None:
    arch = "vgg11, vgg13, vgg16 or vgg19, each also with _bn (default: that of the checkpoint, else vgg16)"
    add("-a", "--arch", choices=vgg.ARCHITECTURES, metavar="NAME", help=arch)
    head = "three linear layers, or a single one for small images (default: that of the checkpoint, else paper)"
    add("--head", choices=list(vgg.HEADS), help=head)
    weights = (
        "to start from: a file, or imagenet, which downloads torchvision's; for other classes the last layer is "
        "initialized again"
    )
    add("--pretrained", **PATH, help=weights)
    freeze = {"dest": "freeze_blocks", "default": 0}
    blocks = "keep the first N of the five blocks of convolutions as they are in --pretrained or --resume"
    add("--freeze-blocks", type=number(int, 0, 5), metavar="N", **freeze, help=f"{blocks} {DEFAULT}")
    add("--freeze-features", action="store_const", const=5, **freeze, help="train only the classifier: all five blocks")
    factor = f"learning rate of the convolutions, as a factor of --lr {DEFAULT}"
    add("--features-lr", type=POSITIVE, metavar="FACTOR", default=1.0, help=factor)


def _add_training(add: Add) -> None:
    add("--epochs", **COUNT, help=DEFAULT)
    add("--start-epoch", **FROM_0, default=0, help=f"number of the first epoch {DEFAULT}")
    add("-b", "--batch-size", **COUNT, help=f"images per step on this node, over all its devices {DEFAULT}")
    add("--accum-steps", **COUNT, default=1, help=f"batches of -b per optimizer step {DEFAULT}")
    add("--lr", "--learning-rate", type=POSITIVE, metavar="RATE", help=f"the highest rate {DEFAULT}")
    schedule = (
        "of the rate, by step: a cosine to --min-lr, a tenth every --lr-step-size epochs, or a line up for 30%% of "
        "the epochs and down to --min-lr (default: the cosine, by epoch)"
    )
    add("--lr-schedule", choices=["cosine", "step", "onecycle"], help=schedule)
    add("--lr-step-size", **COUNT, default=30, help=f"epochs between the drops of --lr-schedule step {DEFAULT}")
    add("--min-lr", type=number(float, 0), metavar="RATE", default=0.0, help=f"lowest rate of the schedule {DEFAULT}")
    add("--warmup-epochs", **FROM_0, help=f"epochs of linear warm-up at the start {DEFAULT}")
    add("--momentum", type=SHARE, metavar="M", default=0.9, help=DEFAULT)
    add("--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), metavar="W", help=DEFAULT)
    add("--label-smoothing", type=SHARE, metavar="S", help=DEFAULT)
    weights = "a weight per class in the loss: auto (inverse frequency), or a file (default: all 1)"
    add("--class-weights", type=class_weights, metavar="auto|FILE", help=weights)
    add("--clip-grad-norm", type=POSITIVE, metavar="NORM", help="of all gradients together (default: no limit)")
    ema = "keep an EMA of the weights, such as 0.9999, and validate it (default: off)"
    add("--ema-decay", type=number(float, 0, below=1), metavar="DECAY", help=ema)
    add("--seed", type=number(int, 0, 2**32 - 1), default=49, help=DEFAULT)
    add("--stop-step-num", **COUNT, help="end cleanly after N steps in all")
    add("--no-bias-decay", **SWITCH, help="no weight decay for biases and batch norm (default: for all)")


def _add_run(add: Add) -> None:
    evaluate = "evaluate the weights of --resume or --pretrained, write metrics.json to --output-dir and exit"
    add("-e", "--e", "--evaluate", dest="evaluate", **SWITCH, help=evaluate)
    view = f"with -e: center crop, ten crops, the whole image, or 50 crops per scale, as in the VGG paper {DEFAULT}"
    add("--eval-view", default="center", choices=VIEWS, help=view)
    scales = "with -e: short sides in pixels (default: 256/224 of --image-size; CIFAR and digits: --image-size)"
    add("--eval-scales", type=SIDE, nargs="+", metavar="Q", help=scales)
    add("--predictions", type=nonempty_path, metavar="FILE.csv", help="with -e: also write one line per image")
    add("--report", **FOLDER, help="with -e: also write a page, DIR/index.html")
    add("--eval-freq", **COUNT, help=f"epochs between validations; the last epoch always validates {DEFAULT}")
    best = f"what decides model_best.pth.tar: Acc@1, the mean F1 or the mean recall of the classes {DEFAULT}"
    add("--best", default="acc1", choices=["acc1", "macro_f1", "balanced_acc"], help=best)
    patience = "stop after N validations without a better --best (default: train all epochs)"
    add("--patience", **COUNT, help=patience)
    add("-p", "--p", "--print-freq", dest="print_freq", **COUNT, default=10, help=f"steps between log lines {DEFAULT}")
    add("--resume", **PATH, help="checkpoint to continue")
    auto = "continue from the newest intact checkpoint in --output-dir; start fresh only if there is none at all"
    add("--auto-resume", **SWITCH, help=auto)
    add("--save-freq", **FROM_0, default=0, help="also save every N steps (default: at the end of epochs only)")
    add("--output-dir", **FOLDER, default=".", help="checkpoints, metrics, curves (default: here)")
    add("--profile", **SWITCH, help="write trace.json to --output-dir: ten steps after five of warm-up, on rank 0")


def _add_device(add: Add) -> None:
    add("--device", **DEVICE_FLAG)
    gpu = "the one device to use: an index into --device-list if that is given, else its number"
    add("--gpu", "--gup", dest="gpu", **FROM_0, help=gpu)
    add("--amp", **SWITCH, help="mixed precision")
    level = f"with --amp: O0 fp32, O1 autocast, O2 half with fp32 master weights, O3 pure half precision {DEFAULT}"
    add("--opt-level", default="O1", choices=["O0", "O1", "O2", "O3"], help=level)
    half = "format of --amp (default: bf16 if the device supports it natively, else fp16; on a CPU fp32)"
    add("--amp-dtype", default="auto", choices=["auto", "fp16", "bf16"], help=half)
    add("--loss-scale-value", type=loss_scale, metavar="SCALE", help="in fp16: a number, or dynamic (default: 1024)")
    add("--deterministic", **SWITCH, help="bitwise repeatable on a GPU too, and slower")
    add("--compile", **SWITCH, help="torch.compile the training step (torch 2, gpu and cpu; requires a compiler)")


def _add_parallel(add: Add) -> None:
    add("--multiprocessing-distributed", **SWITCH, help="one process per device of --device-list")
    devices = "device numbers (default: all); on a CPU its length is the number of processes"
    add("--device-list", type=device_list, metavar="0,1,…", help=devices)
    add("--world-size", **RANK, help="nodes with --multiprocessing-distributed, else processes (default: one)")
    add("--rank", **RANK, help="rank of this node, from 0")
    add("--addr", default="127.0.0.1", help=f"address of the node of rank 0 {DEFAULT}")
    add("--dist-url", metavar="URL", help="rendezvous (default: tcp://ADDR:PORT; env:// under torchrun)")
    wait = f"how long to wait for other nodes {DEFAULT}"
    add("--rendezvous-timeout", type=number(int, 1), metavar="SECONDS", default=600, help=wait)
    add("--dist-backend", choices=["hccl", "nccl", "gloo"], help="of the gradients (default: by device)")
    compress = "format of the gradients on the network (torch 2; default: that of the weights)"
    add("--grad-compress", default="none", choices=["none", "bf16", "fp16"], help=compress)


def _conflicts(args: argparse.Namespace) -> list[str]:
    """Return what is wrong with flags that are each right."""
    evaluate, auto, weights = args.evaluate, args.auto_resume, args.resume or args.pretrained
    real_data = args.data or args.val_split or evaluate
    conflicts = {
        "--evaluate requires weights: --resume PATH or --pretrained PATH": evaluate and not weights,
        "--report requires --evaluate": args.report and not evaluate,
        "--predictions requires --evaluate": args.predictions and not evaluate,
        "--eval-view requires --evaluate": args.eval_view != "center" and not evaluate,
        "--eval-scales requires --evaluate": args.eval_scales and not evaluate,
        "--evaluate cannot be combined with --auto-resume: name the checkpoint with --resume": evaluate and auto,
        "--resume cannot be combined with --auto-resume: give one of them": args.resume and auto,
        "--crop-scale cannot be combined with --train-scale: give one of them": args.crop_scale and args.train_scale,
        "--freeze-blocks or --freeze-features requires weights: --resume PATH or --pretrained PATH": args.freeze_blocks
        and not weights,
        "--features-lr has no effect with --freeze-features: leave one of them out": args.features_lr != 1
        and args.freeze_blocks == 5,
        "--dummy cannot be combined with --data, --val-split or --evaluate: leave it out": args.dummy and real_data,
        "--class-weights requires training images: leave --dummy out": args.class_weights and args.dummy,
        "--patience requires validation images: leave --dummy out": args.patience and args.dummy,
        "--val-split requires --data: a folder of classes or a list of images": args.val_split and not args.data,
        "--world-size must be at least 1, got 0": args.world_size == 0,
    }
    for flag, bounds in (("--crop-scale", args.crop_scale), ("--train-scale", args.train_scale)):
        if bounds:
            conflicts[f"{flag}: MIN must be at most MAX, got {bounds[0]} {bounds[1]}"] = bounds[0] > bounds[1]
    is_list = args.data and args.data.lower().endswith(LISTS) and os.path.isfile(args.data)
    if args.data and not os.path.isdir(args.data) and not is_list:
        found = f"expected a folder or a list ({' '.join(LISTS)})" if os.path.exists(args.data) else "no such folder"
        conflicts[f"--data {args.data}: {found}"] = True
    for flag, folder in (("--output-dir", args.output_dir), ("--report", args.report)):
        if args.val_split and folder and args.data and os.path.isdir(args.data):
            below = os.path.relpath(os.path.realpath(folder), os.path.realpath(args.data))
            found = f"{flag} {folder} lies in --data {args.data}, whose folders are the classes: choose one outside"
            conflicts[found] = below == "." or not below.startswith(".")  # a hidden folder is no class
    reads_weights = args.rank <= 0 and os.environ.get("RANK", "0") == "0"  # only rank 0 does
    for flag, file in (("--resume", args.resume), ("--pretrained", args.pretrained)):
        if file and reads_weights and not os.path.isfile(file) and (flag, file) != ("--pretrained", "imagenet"):
            found = "expected a file, this is a folder" if os.path.isdir(file) else "no such file"
            conflicts[f"{flag} {file}: {found}"] = True
    return [conflict for conflict, found in conflicts.items() if found]


def schedule_conflicts(args: argparse.Namespace, *, lr_is_known: bool = True) -> list[str]:
    """Return what is wrong with the schedule. With few images --epochs may still become less, and --lr more."""
    conflicts = {
        f"{flag} must be less than --epochs {args.epochs}, got {epochs}": epochs >= args.epochs
        for flag, epochs in (("--start-epoch", args.start_epoch), ("--warmup-epochs", args.warmup_epochs))
    }
    conflicts[f"--min-lr must be at most --lr {args.lr}, got {args.min_lr}"] = lr_is_known and args.min_lr > args.lr
    return [conflict for conflict, found in conflicts.items() if found]
