# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints: what they hold, crash-safe files, and continuing a run."""

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.contents import Checkpoint, RunInfo, TrainState, save_safetensors
from engine.checkpoints.file import CheckpointWriter
from engine.checkpoints.model import CLASSES_HELP, Model, check_output, load_model
from engine.checkpoints.svd import factorize

__all__ = [
    "CLASSES_HELP",
    "Checkpoint",
    "CheckpointWriter",
    "Checkpointer",
    "Model",
    "RunInfo",
    "TrainState",
    "check_output",
    "factorize",
    "load_model",
    "save_safetensors",
]
