# SPDX-License-Identifier: BSD-3-Clause
"""Which precision a device trains in: fp32, fp16 or bf16, by torch's autocast or by apex."""

from __future__ import annotations

import os
import re
from typing import Any

from engine.device import TORCH_DEVICES, notice
from engine.errors import DeviceUnavailableError
from engine.versions import TORCH

import torch


def resolve_precision(device: str, devices: list[int], *, amp: bool, opt_level: str, amp_dtype: str) -> str:
    """Return the number format of the step: fp32, fp16 or bf16.

    bf16 if the device supports it natively (NPUs from the A2 on, Ampere and later, CPUs with bf16 instructions), else
    fp16. amp_dtype fp16 or bf16 forces it. devices: the numbers of those that will be used.
    """
    if not amp or opt_level == "O0":
        return "fp32"
    if device == "cpu":
        return _cpu_precision(amp_dtype)
    if device == "mps" and TORCH < (2, 5):
        raise DeviceUnavailableError(f"--amp on MPS requires torch 2.5 or later, this is {torch.__version__}")
    if needs_apex(device):
        load_apex()
        if amp_dtype == "bf16":
            raise DeviceUnavailableError(
                f"--amp-dtype bf16 requires torch 1.10 or later, this is {torch.__version__}; use fp16"
            )
        return "fp16"
    if device == "gpu":  # not torch.cuda.is_bf16_supported, which asks GPU 0 and counts emulation
        ampere = all(torch.cuda.get_device_capability(index)[0] >= 8 for index in devices)
        has_bf16 = TORCH >= (1, 10) and ampere
    else:
        runtime = getattr(torch, TORCH_DEVICES[device])
        has_bf16 = TORCH >= (1, 10) and getattr(runtime, "is_bf16_supported", lambda: False)()
    if amp_dtype == "bf16" and not has_bf16:
        raise DeviceUnavailableError(f"--amp-dtype bf16: this {device} has no bf16; use --amp-dtype fp16")
    if amp_dtype != "auto":
        return amp_dtype
    return "bf16" if has_bf16 else "fp16"


def _cpu_precision(amp_dtype: str) -> str:
    if TORCH < (1, 10):
        raise DeviceUnavailableError(
            f"--amp on a CPU requires torch 1.10 or later, this is {torch.__version__}; leave --amp out or use "
            "--opt-level O0"
        )
    if amp_dtype == "fp16":
        raise DeviceUnavailableError(
            "--amp-dtype fp16 is not supported on a CPU, where it is 15 times slower than bf16; use --amp-dtype bf16"
        )
    if amp_dtype == "auto" and not _cpu_has_bf16():
        notice(
            "this CPU has no bf16 instructions, and without them bf16 is slower than fp32: --amp changes nothing here "
            "(--amp-dtype bf16 forces it)"
        )
        return "fp32"
    return "bf16"


def _cpu_has_bf16() -> bool:
    """Whether the processor has instructions to multiply bf16 (x86: avx512_bf16, amx_bf16; Arm: bf16)."""
    if not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo") as file:
        pattern = r"^(flags|Features)\s*:.*\b(avx512_bf16|amx_bf16|bf16)\b"
        return re.search(pattern, file.read(), re.MULTILINE) is not None


def needs_apex(device: str) -> bool:
    """Whether this torch has no mixed precision of its own for a device: npu, gpu, mps or cpu."""
    runtime = getattr(torch, TORCH_DEVICES[device], None)  # torch.cuda, torch.npu, …
    return TORCH < (1, 10) and not hasattr(getattr(runtime, "amp", None), "autocast")


def load_apex() -> Any:
    """Return apex.amp: mixed precision before torch 1.6, and on NPUs with torch 1.8 too (Ascend's apex).

    The `apex` on PyPI is another project, and NVIDIA's has had no amp since 2025.
    """
    try:
        from apex import amp

        return amp
    except ImportError as error:
        raise DeviceUnavailableError(
            f"--amp with torch {torch.__version__} on this device requires Ascend's or NVIDIA's apex with apex.amp "
            f"({error}); install it or leave --amp out"
        ) from error
