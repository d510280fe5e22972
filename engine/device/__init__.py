# SPDX-License-Identifier: BSD-3-Clause
"""The device: which one, how a step runs on it, in which precision."""

from engine.device.amp import Amp, MixedPrecisionOptimizer
from engine.device.choice import (
    available_cores,
    check_torch_options,
    default_workers,
    needs_apex,
    resolve_backend,
    resolve_device,
    resolve_device_list,
    resolve_precision,
)
from engine.device.compute import ComputeDevice
from engine.device.ema import ModelEma

__all__ = [
    "Amp",
    "ComputeDevice",
    "MixedPrecisionOptimizer",
    "ModelEma",
    "available_cores",
    "check_torch_options",
    "default_workers",
    "needs_apex",
    "resolve_backend",
    "resolve_device",
    "resolve_device_list",
    "resolve_precision",
]
