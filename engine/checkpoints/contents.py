# SPDX-License-Identifier: BSD-3-Clause
"""What a checkpoint holds. file.py reads and writes the files, checkpointer.py saves and continues runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any, Callable

from engine.checkpoints.file import load
from engine.device import MixedPrecisionOptimizer, ModelEma
from engine.errors import CheckpointError, CheckpointReadError, UsageError, first_line
from engine.records import Totals

import vgg

import torch


@dataclass
class TrainState:
    """Training progress."""

    epoch: int = 0  # epochs completed
    step_in_epoch: int = 0  # optimizer steps of the current epoch
    images_in_epoch: int = 0  # images of the current epoch that these steps have used, over all processes
    step: int = 0  # total optimizer steps
    best_acc1: float = 0.0  # percent
    best_by: str = "acc1"  # what decides which validation is the best
    best_value: float = 0.0  # the best of it
    since_best: int = 0  # validations since then

    def add_validation(self, metrics: dict[str, float]) -> bool:
        """Take the metrics of a validation in; return whether it is the best, or as good."""
        value = metrics[self.best_by]
        self.since_best = 0 if value > self.best_value else self.since_best + 1
        self.best_value, self.best_acc1 = max(value, self.best_value), max(metrics["acc1"], self.best_acc1)
        return value == self.best_value

    def is_finished(self, epochs: int, stop_step_num: int | None, patience: int | None) -> bool:
        stopped = stop_step_num is not None and self.step >= stop_step_num
        return stopped or self.epoch >= epochs or self.has_lost_patience(patience)

    def has_lost_patience(self, patience: int | None) -> bool:
        """Whether so many validations have not been better than the best one."""
        return patience is not None and self.since_best >= patience

    def position(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}


@dataclass
class RunInfo:
    """What a run trains, and on what. A run that continues must agree with it, see Checkpointer.check.

    In a checkpoint that is not ours, or is an older one of ours, much of it has the value that stands for nothing.

    images_per_step: over all processes and batches of a step.
    batch: the flags behind it, and the images per step that a resize keeps (with_checkpoint in options/resolve.py).
    identity: {name: value} of what else decides the training images, the loss or the step.
    class_weights: of the training loss. decoder: of the training images.
    """

    arch: str | None = None
    classes: list[str] = field(default_factory=list)
    preprocessing: dict[str, Any] = field(default_factory=dict)  # image_size, crop, mean, std
    world_size: int = 0
    images_per_step: int = 0
    small_defaults: bool = False  # whether the flags that were not given had the defaults for few images
    val_split: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    class_weights: list[float] | None = None
    decoder: str | None = None


@dataclass
class Checkpoint:
    """A checkpoint as it was read: ours, the reference's, or weights alone."""

    path: str
    weights: dict[str, torch.Tensor]  # torchvision's names
    ema_weights: dict[str, torch.Tensor] | None = None
    info: RunInfo = field(default_factory=RunInfo)  # of the run that saved it
    progress: dict[str, Any] = field(default_factory=dict)  # the entries for continuing, not checked yet

    @property
    def best_weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate and to predict with: the EMA's if there is one."""
        return self.weights if self.ema_weights is None else self.ema_weights


def to_file(
    state: TrainState, totals: Totals, info: RunInfo, optimizer: MixedPrecisionOptimizer, ema: ModelEma | None
) -> dict[str, Any]:
    """Return the content of a checkpoint file: plain values and CPU tensors. A synchronization.

    Parameter names are torchvision's, values fp32. Epoch, state_dict, best_acc1, optimizer and amp are the reference's.
    totals: of the current epoch, summed over all processes.
    """
    record = {**vars(info), "identity": {**info.identity, "global batch": info.images_per_step}}
    del record["images_per_step"]
    return {
        **vars(state),
        **record,
        "counts": list(totals),
        "state_dict": optimizer.model_state_dict(),
        **({} if ema is None else {"state_dict_ema": ema.state_dict()}),
        "optimizer": optimizer.optimizer_state_dict(),
        "amp": optimizer.state_dict(),
    }


# --- reading ----------------------------------------------------------------------------------------------------------


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


# The entries of RunInfo, and what makes a value ours: another program's value of that name is left out.
INFO: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str) and value in vgg.ARCHITECTURES,
    "classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "preprocessing": _is_preprocessing,
    "val_split": lambda value: isinstance(value, float),
    "small_defaults": lambda value: isinstance(value, bool),
    "identity": lambda value: isinstance(value, dict) and isinstance(value.get("global batch", 0), int),
    "batch": _is_batch,
    "world_size": lambda value: isinstance(value, int),
    "decoder": lambda value: isinstance(value, str),
}
# Where the weights are: ours, Lightning's and most others'; torchvision's references; tutorials; kuangliu; DeepSpeed.
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "module")
PROGRESS = ["epoch", "best_acc1", "optimizer", "amp", "step", "step_in_epoch", "images_in_epoch", "counts"]
PROGRESS += ["best_by", "best_value", "since_best"]


def load_checkpoint(path: str) -> Checkpoint:
    """Read a checkpoint file, or weights in a *.safetensors file.

    Raises CheckpointError, or UsageError if it holds no weights.
    """
    content = _load_safetensors(path) if path.endswith(".safetensors") else load(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    found = (content[key] for key in CONTAINERS if key in content and not isinstance(content[key], str))
    weights, ema = _checked_weights(next(found, content), path), content.get("state_dict_ema")
    ema_weights = None if ema is None else _checked_weights(ema, path)
    info = RunInfo(**{key: content[key] for key, is_ours in INFO.items() if key in content and is_ours(content[key])})
    info.identity = dict(info.identity)
    info.images_per_step = info.identity.pop("global batch", 0)
    return Checkpoint(path, weights, ema_weights, info, {key: content[key] for key in PROGRESS if key in content})


def _checked_weights(weights: Any, path: str) -> dict[str, torch.Tensor]:
    """Return a state dict under torchvision's names. Raises UsageError if it is not one."""
    items = weights.items() if isinstance(weights, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in items):
        raise UsageError(f"{path}: holds no weights (expected a state_dict of tensors)")
    return vgg.to_torchvision_names(weights)


def _load_safetensors(path: str) -> dict[str, Any]:
    """Read what save_safetensors wrote, or any other such file. Raises CheckpointError."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise CheckpointError(f"{path}: reading it requires safetensors: pip install safetensors") from error
    try:
        # With torch before 1.10 it gives NumPy's arrays only.
        with safe_open(path, framework="pt" if hasattr(torch, "frombuffer") else "np") as file:
            metadata = file.metadata() or {}
            weights = {name: torch.as_tensor(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  not a dict
    except OSError as error:
        raise CheckpointReadError(f"{path}: {error.strerror or first_line(error)}") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: corrupt, or not a safetensors file ({first_line(error)})") from error
    content: dict[str, Any] = {"state_dict": weights}
    for key in INFO:
        with contextlib.suppress(KeyError, ValueError):
            content[key] = json.loads(metadata[key])
    return content


def save_safetensors(state_dict: dict[str, torch.Tensor], path: str, **info: Any) -> None:
    """Write weights for other programs; info (arch, classes, preprocessing) goes to the file's metadata as JSON.

    Requires the package safetensors. Raises OSError.
    """
    from safetensors.numpy import save  # that of safetensors.torch requires torch 1.13

    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in info.items()}}
    content = save({name: tensor.contiguous().numpy() for name, tensor in state_dict.items()}, metadata)
    with open(path, "wb") as file:
        file.write(content)


# --- into a network ---------------------------------------------------------------------------------------------------


def load_weights(network: vgg.VGG, weights: dict[str, torch.Tensor], path: str) -> None:
    """Load a state dict. Raises UsageError, naming the first parameter that does not fit."""
    problem = vgg.describe_mismatch(weights, network)
    if problem:
        own = network.state_dict()
        found, wanted, head = vgg.architecture_of(weights), vgg.architecture_of(own), vgg.head_of(weights)
        advice = "check --arch and the number of classes"
        if found != wanted:
            advice = f"it holds {found or vgg.describe_weights(weights)}, not {wanted}"
        elif head != vgg.head_of(own):
            advice = f"it has the {head} head: use --head {head}"
        raise UsageError(f"{path}: {problem}", f"; {advice}")
    network.load_state_dict(weights, strict=False)
