# SPDX-License-Identifier: BSD-3-Clause
"""What a checkpoint holds, and how a run continues from one. checkpoint_file.py writes and reads the files."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Any, Callable

import vgg
from engine import console
from engine.checkpoints.file import load
from engine.data.datasets import check_same_classes
from engine.data.images import decoder_name
from engine.device.step import MixedPrecisionOptimizer, ModelEma
from engine.errors import CheckpointError, UsageError, first_line
from engine.records.logger import Logger
from engine.records.metrics import AccuracyCounter, Totals

import torch

LATEST, BEST, PREVIOUS = "checkpoint.pth.tar", "model_best.pth.tar", "checkpoint.pth.tar.previous"


def _is_preprocessing(value: Any) -> bool:
    """Whether its image size, mean and standard deviation, as far as they are there, can be used."""
    if not isinstance(value, dict):
        return False
    size, colors = value.get("image_size", 224), [value[name] for name in ("mean", "std") if name in value]
    numbers = [
        isinstance(color, (list, tuple)) and [isinstance(part, (int, float)) for part in color] for color in colors
    ]
    return isinstance(size, int) and size > 0 and all(number == [True] * 3 for number in numbers)


def _is_batch(value: Any) -> bool:
    names = ("batch_size", "accum_steps", "images_per_step")
    counts = [value.get(name) for name in names] if isinstance(value, dict) else [None]
    return value == {} or all(isinstance(count, int) and count > 0 for count in counts)


# Optional entries, and what makes their value ours: another program's value of that name is left out.
METADATA: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "classes": lambda value: isinstance(value, list),
    "preprocessing": _is_preprocessing,
    "val_split": lambda value: isinstance(value, float),
    "identity": lambda value: isinstance(value, dict),
    "batch": _is_batch,
}


@dataclass
class TrainState:
    """Training progress."""

    epoch: int = 0  # epochs completed
    step_in_epoch: int = 0  # optimizer steps of the current epoch
    images_in_epoch: int = 0  # images of the current epoch that these steps have used, over all processes
    step: int = 0  # total optimizer steps
    best_acc1: float = 0.0  # percent

    def is_finished(self, epochs: int, stop_step_num: int | None) -> bool:
        return self.epoch >= epochs or (stop_step_num is not None and self.step >= stop_step_num)

    def position(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}


@dataclass
class ModelInfo:
    """What the weights belong to."""

    arch: str
    classes: list[str]
    preprocessing: dict[str, Any]  # image_size, crop, mean, std: for predict.py and export.py
    world_size: int
    val_split: float | None = None  # --val-split
    identity: dict[str, Any] = field(default_factory=dict)  # must agree within an epoch, except "global batch"
    batch: dict[str, int] = field(default_factory=dict)  # see keep_images_per_step
    decoder: str = field(default_factory=decoder_name)  # of the training images


def build_checkpoint(
    state: TrainState, totals: Totals, info: ModelInfo, scaler: MixedPrecisionOptimizer, ema: ModelEma | None
) -> dict[str, Any]:
    """Return the checkpoint: plain values and CPU tensors. A synchronization.

    Parameter names are torchvision's, values fp32. Epoch, state_dict, best_acc1, optimizer and amp are the reference's.
    totals: of the current epoch, summed over all processes.
    """
    ema_weights = {} if ema is None else {"state_dict_ema": ema.state_dict()}
    return {
        "epoch": state.epoch,
        "arch": info.arch,
        "state_dict": scaler.model_state_dict(),
        **ema_weights,
        "best_acc1": state.best_acc1,
        "optimizer": scaler.optimizer_state_dict(),
        "amp": scaler.state_dict(),
        "step": state.step,
        "step_in_epoch": state.step_in_epoch,
        "images_in_epoch": state.images_in_epoch,
        "counts": list(totals),
        "classes": info.classes,
        "identity": info.identity,
        "batch": info.batch,
        "val_split": info.val_split,
        "world_size": info.world_size,
        "preprocessing": info.preprocessing,
        "decoder": info.decoder,
    }


# --- safetensors ------------------------------------------------------------------------------------------------------


def save_safetensors(state_dict: dict[str, torch.Tensor], path: str, **info: Any) -> None:
    """Write weights for other programs; info (arch, classes, preprocessing) goes to the file's metadata as JSON.

    Requires the package safetensors. Raises OSError.
    """
    from safetensors.torch import save

    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in info.items()}}
    content = save({name: tensor.contiguous() for name, tensor in state_dict.items()}, metadata)
    with open(path, "wb") as file:
        file.write(content)


def load_safetensors(path: str) -> dict[str, Any]:
    """Read what save_safetensors wrote, or any other such file, whose metadata is ignored. Raises CheckpointError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it requires safetensors: pip install safetensors") from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or first_line(error)}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt, or not a safetensors file ({first_line(error)})") from error
    info: dict[str, Any] = {}
    for key, is_ours in METADATA.items():
        with contextlib.suppress(KeyError, ValueError):
            value = json.loads(metadata[key])
            if is_ours(value):
                info[key] = value
    return {"state_dict": weights, **info}


# --- reading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint file, or weights in a *.safetensors file. Raises CheckpointError."""
    checkpoint = load_safetensors(path) if path.endswith(".safetensors") else load(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return {key: value for key, value in checkpoint.items() if key not in METADATA or METADATA[key](value)}


def model_weights(checkpoint: dict[str, Any], path: str, *, ema: bool = True) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint, or in a file that is nothing but one, under torchvision's names.

    ema: prefer the EMA weights if the checkpoint has them. Raises UsageError if there are no weights.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    if ema and "state_dict_ema" in checkpoint:
        weights = checkpoint["state_dict_ema"]
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not weights or not named or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UsageError(f"{path}: holds no weights (expected a state_dict of tensors)")
    return vgg.to_torchvision_names(weights)


def load_weights(network: vgg.VGG, weights: dict[str, torch.Tensor], path: str) -> None:
    """Load a state dict. Raises UsageError, naming the first parameter that does not fit."""
    problem = vgg.describe_mismatch(weights, network)
    if problem:
        found, wanted = vgg.architecture_of(weights), vgg.architecture_of(network.state_dict())
        advice = "check --arch and the number of classes" if found == wanted else f"it holds {found}, not {wanted}"
        raise UsageError(f"{path}: {problem}; {advice}")
    network.load_state_dict(weights, strict=False)


def load_pretrained(network: vgg.VGG, checkpoint: dict[str, Any], path: str, logger: Logger) -> None:
    """Load the weights of a checkpoint to start training from. Raises UsageError if they do not fit.

    A last layer for another number of classes is left as it was initialized.
    """
    weights = model_weights(checkpoint, path)
    for name in (f"{vgg.LAST_LAYER}.weight", f"{vgg.LAST_LAYER}.bias"):
        own = network.state_dict()[name]
        other_count = name in weights and weights[name].shape[1:] == own.shape[1:] and len(weights[name]) != len(own)
        if other_count:
            console.line(f"=> {name}: {len(weights[name])} classes in {path}, {len(own)} here: re-initialized")
            weights[name] = own
    load_weights(network, weights, path)
    kind = "EMA weights" if "state_dict_ema" in checkpoint else "weights"
    console.line(f"=> loaded the {kind} of '{path}'")


# --- continuing -------------------------------------------------------------------------------------------------------


def check_resumable(checkpoint: dict[str, Any], info: ModelInfo, *, evaluate: bool) -> None:
    """Raise UsageError, with both values, if a checkpoint does not fit this run.

    Training and evaluation: classes and --val-split. Training only: the architecture, and within an epoch what decides
    its images.
    """
    if checkpoint.get("arch") not in (None, info.arch) and not evaluate:
        saved = checkpoint["arch"]
        raise UsageError(f"the checkpoint holds {saved}, this run uses {info.arch}: use --arch {saved}")
    if checkpoint.get("classes"):
        check_same_classes(checkpoint["classes"], info.classes, "the checkpoint", "the data")
    val_split = checkpoint.get("val_split")
    if None not in (val_split, info.val_split) and val_split != info.val_split:
        raise UsageError(
            f"the checkpoint was trained with --val-split {val_split}, this run has {info.val_split}, so it would "
            f"validate on images that the model was trained on: use --val-split {val_split}"
        )
    if checkpoint.get("step_in_epoch") and not evaluate:
        for name, (before, now) in _identity_changes(checkpoint, info).items():
            raise UsageError(
                f"the checkpoint was saved within an epoch with {name} {before}, this run has {now}: finish the epoch "
                "with the same flags and data, or take its weights alone with --pretrained"
            )


def _identity_changes(checkpoint: dict[str, Any], info: ModelInfo) -> dict[str, tuple[Any, Any]]:
    """Return {name: (saved, now)} of what decides the training images and differs."""
    saved, now, default = checkpoint.get("identity") or {}, info.identity, "the default"
    names = [name for name in {**now, **saved} if saved.get(name) != now.get(name) and name != "global batch"]
    return {name: (saved.get(name, default), now.get(name, default)) for name in names}


def restore(
    checkpoint: dict[str, Any],
    state: TrainState,
    counter: AccuracyCounter,
    scaler: MixedPrecisionOptimizer,
    ema: ModelEma | None,
    rank: int,
) -> None:
    """Load everything but the weights from a checkpoint, ours or the reference's. Raises UsageError."""
    try:
        scaler.load_optimizer_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint.get("amp") or {})
        if ema is not None and "state_dict_ema" in checkpoint:
            ema.load_state_dict(vgg.to_torchvision_names(checkpoint["state_dict_ema"]))
        state.epoch, state.step_in_epoch = int(checkpoint["epoch"]), int(checkpoint.get("step_in_epoch", 0))
        images = state.step_in_epoch * _images_per_step(checkpoint)  # older checkpoints do not say it
        state.images_in_epoch = int(checkpoint.get("images_in_epoch", images))
        state.step, state.best_acc1 = int(checkpoint.get("step", 0)), float(checkpoint.get("best_acc1", 0.0))
        if min(state.epoch, state.step_in_epoch, state.images_in_epoch, state.step) < 0:
            raise ValueError("its progress is negative")
        if state.step_in_epoch and rank == 0:  # the counts are sums over all processes
            counter.load(checkpoint["counts"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(
            f"training cannot continue from this checkpoint ({type(error).__name__}: {error}); --pretrained "
            "takes its weights alone"
        ) from error


def _images_per_step(checkpoint: dict[str, Any]) -> int:
    return int((checkpoint.get("identity") or {}).get("global batch", 0))


def log_changes(
    checkpoint: dict[str, Any] | None,
    info: ModelInfo,
    state: TrainState,
    ema: ModelEma | None,
    count: int,
    logger: Logger,
) -> None:
    """Log how a resumed run differs from the one that saved, or what a new run replaces.

    count: training images.
    """
    if checkpoint is None:
        path = os.path.join(logger.folder, LATEST)
        if logger.writes and os.path.exists(path):
            console.warning(
                f"this run replaces {path}, the checkpoint of an earlier run; --auto-resume would continue that run"
            )
        return
    lines = []
    if ema is not None and "state_dict_ema" not in checkpoint:
        lines.append("the checkpoint has no EMA weights: the EMA starts from the current weights")
    if ema is None and "state_dict_ema" in checkpoint:
        lines.append("the EMA weights of the checkpoint are dropped: use --ema-decay to continue them")
    if checkpoint.get("identity"):  # a checkpoint of the reference has none
        # Between epochs: within one, check_resumable refuses them.
        for name, (before, now) in _identity_changes(checkpoint, info).items():
            if name == "data":
                lines.append(
                    "resumed with different training images: the model may have been trained on some of the current "
                    "validation images"
                )
            else:
                lines.append(f"resumed with {name} {now}, saved with {before}")
    saved_on = checkpoint.get("world_size", info.world_size)
    if saved_on != info.world_size:
        lines.append(
            f"resumed on {info.world_size} processes, saved on {saved_on}: the same images in the same order, but "
            "dropout and rounding differ"
        )
    images, saved_images = info.identity["global batch"], _images_per_step(checkpoint)
    if state.step_in_epoch and saved_images != images:
        left_out = (count - state.images_in_epoch) % images
        lines.append(
            f"resumed with {images} images per step, saved with {saved_images}: this epoch continues after its first "
            f"{state.images_in_epoch:,} images" + (f", without its last {left_out:,}" if left_out else "")
        )
    decoder = checkpoint.get("decoder", info.decoder)
    if state.step_in_epoch and decoder != info.decoder:
        lines.append(
            f"resumed with {info.decoder}, saved with {decoder}: the rest of this epoch's JPEGs may differ by a gray "
            "level"
        )
    for line in lines:
        console.line(f"=> {line}")
