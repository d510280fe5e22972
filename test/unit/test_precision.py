# SPDX-License-Identifier: BSD-3-Clause
"""Which precision the flags mean, and what is refused. test_device.py has what an NPU takes."""

from __future__ import annotations

import sys
from typing import Any

from engine import precision
from engine.errors import DeviceUnavailableError
from engine.versions import TORCH

import pytest


@pytest.mark.skipif(TORCH < (1, 10), reason="mixed precision on a CPU requires torch 1.10")
def test_amp_on_a_cpu_is_bf16_if_the_cpu_has_instructions_for_it(monkeypatch: Any, capsys: Any) -> None:
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert precision.resolve_precision("cpu", amp=True, opt_level="O1", amp_dtype="auto") == expected
        assert ("--amp changes nothing here" in capsys.readouterr().out) == (not has_bf16)
        assert precision.resolve_precision("cpu", amp=True, opt_level="O1", amp_dtype="bf16") == "bf16"
    with pytest.raises(DeviceUnavailableError, match="--amp-dtype fp16 is not supported on a CPU"):
        precision.resolve_precision("cpu", amp=True, opt_level="O1", amp_dtype="fp16")


def test_fp16_without_autocast_names_apex(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "has_autocast", lambda runtime: False)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(DeviceUnavailableError, match="requires Ascend's or NVIDIA's apex with apex.amp"):
        precision.resolve_precision("gpu", amp=True, opt_level="O1", amp_dtype="auto")
