# SPDX-License-Identifier: BSD-3-Clause
"""A small training run without a program, and what it saves."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from engine.checkpoints import Checkpointer, RunInfo, TrainState
from engine.checkpoints.contents import load_checkpoint, to_file
from engine.checkpoints.file import CheckpointWriter
from engine.device import Amp, ComputeDevice, ModelEma
from engine.records import AccuracyCounter, Totals

from helpers.step import optimizer_of

import torch
from torch import nn

COUNTS = Totals(24.0, 10.0, 20.0, 30.5)


class SmallNet(nn.Module):
    """A VGG of one layer of each kind; the last one is classifier.6, as in VGG."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Linear(4, 8),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(8, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


def comm(rank: int = 0) -> Any:
    """A job of one process, which may believe that it has another rank."""
    return SimpleNamespace(rank=rank, broadcast=lambda value: value, any=bool)


class Run:
    """The parts of a training run that a checkpoint holds."""

    def __init__(self, seed: int = 0, ema: bool = True, **info: Any) -> None:
        torch.manual_seed(seed)
        self.network, self.state = SmallNet(), TrainState()
        device = ComputeDevice("cpu")
        self.optimizer = optimizer_of(self.network, Amp(device))
        self.ema = ModelEma(self.network, self.optimizer.weights, self.optimizer.master_weights) if ema else None
        self.counter = AccuracyCounter(device.device)
        self.info = RunInfo(
            **{
                "arch": "vgg16",
                "classes": ["a", "b", "c", "d"],
                "preprocessing": {"image_size": 8},
                "identity": {"seed": 7},
                "images_per_step": 12,
                "decoder": "simplejpeg",
                "world_size": 1,
                **info,
            }
        )

    def train(self, steps: int) -> Run:
        """Take steps whose images depend on nothing but the number of the step."""
        for _ in range(steps):
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(self.state.step))
            self.optimizer.backward(self.network(images).pow(2).mean())
            self.optimizer.step()
            self.state.step += 1
            self.state.step_in_epoch += 1
            if self.ema is not None:
                self.ema.update(0.9, self.state.step, self.optimizer.skipped)
        return self

    def content(self) -> dict[str, Any]:
        """What the run would save now."""
        return to_file(self.state, COUNTS, self.info, self.optimizer, self.ema)

    def resume(self, path: Any, rank: int = 0, folder: Any = None) -> Run:
        """Continue from a file as main.py does. folder: of --output-dir, else that of the file."""
        checkpointer = Checkpointer(str(folder or os.path.dirname(str(path))), comm(rank), evaluate=False)
        checkpointer.start = checkpointer.continued = load_checkpoint(str(path))
        checkpointer.check(self.info)
        checkpointer.load_weights(self.network)  # type: ignore[arg-type]
        checkpointer.restore(self.state, self.counter, self.optimizer, self.ema)
        checkpointer.log_changes(self.state, self.ema, 100)
        return self


def save(content: Any, path: Any) -> str:
    writer = CheckpointWriter()
    writer.save(content, str(path))
    assert writer.wait() is None
    return str(path)
