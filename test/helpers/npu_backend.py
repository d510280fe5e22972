# SPDX-License-Identifier: BSD-3-Clause
"""A stand-in for an NPU that computes nothing: for tests of the device, backend, precision and memory format chosen.

On torch 2.6 and later, `register` gives torch a real backend named npu (torch.device("npu:0"), autocast("npu")) whose
module is a Recorder. On older torch, `torch.npu` is only the Recorder.
"""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import torch


class Recorder(types.ModuleType):
    """A torch.npu that returns what its callers expect and lists the calls."""

    def __init__(self, count: int = 8, bf16: bool = False) -> None:
        super().__init__("torch.npu")
        self.count, self.bf16, self.current = count, bf16, 0
        self.calls: list[str] = []
        self.config = types.SimpleNamespace(allow_internal_format=None)
        self.amp = types.SimpleNamespace(autocast=contextlib.nullcontext)

    def is_available(self) -> bool:
        return self.count > 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return self.current

    def is_bf16_supported(self) -> bool:
        return self.bf16

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def set_device(self, device: Any) -> None:
        self.current = getattr(device, "index", device)
        self.calls.append(f"set_device {self.current}")

    def set_compile_mode(self, jit_compile: bool) -> None:
        self.calls.append(f"jit_compile {jit_compile}")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def manual_seed(self, seed: int) -> None:
        self.calls.append("manual_seed")

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_device_name(self, device: Any) -> str:
        return "no NPU, a recorder"


def register(**options: Any) -> Recorder:
    """Make torch.npu a Recorder, behind a registered backend if torch supports one from Python. Returns it."""
    recorder = Recorder(**options)
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up
    except ImportError:
        torch.npu = sys.modules["torch.npu"] = recorder
    else:
        set_up("npu", backend_module=recorder)
    return recorder
