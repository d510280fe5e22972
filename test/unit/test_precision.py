# SPDX-License-Identifier: BSD-3-Clause
"""Which precision the flags mean, and what is refused. test_device.py has what an NPU takes."""

from __future__ import annotations

import sys
from typing import Any

from engine.device import choice as precision
from engine.errors import DeviceUnavailableError, UsageError
from engine.options.flags import parse_args
from engine.options.resolve import resolve_flags
from engine.versions import TORCH

import pytest


@pytest.mark.skipif(TORCH < (1, 10), reason="mixed precision on a CPU requires torch 1.10")
def test_amp_on_a_cpu_is_bf16_if_the_cpu_has_instructions_for_it(monkeypatch: Any, capsys: Any) -> None:
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        assert precision.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="auto") == expected
        assert ("--amp changes nothing here" in capsys.readouterr().out) == (not has_bf16)
        assert precision.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="bf16") == "bf16"
    with pytest.raises(DeviceUnavailableError, match="--amp-dtype fp16 is not supported on a CPU"):
        precision.resolve_precision("cpu", [0], amp=True, opt_level="O1", amp_dtype="fp16")


def test_bf16_on_gpus_requires_that_each_of_them_has_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "needs_apex", lambda device: False)
    monkeypatch.setattr(precision.torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    options: dict[str, Any] = {"amp": True, "opt_level": "O1", "amp_dtype": "auto"}
    expected = {(0,): "bf16" if TORCH >= (1, 10) else "fp16", (1,): "fp16", (0, 1): "fp16"}
    assert {devices: precision.resolve_precision("gpu", list(devices), **options) for devices in expected} == expected


def test_apex_takes_no_dynamic_loss_scale(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "needs_apex", lambda device: True)
    monkeypatch.setattr(precision, "resolve_precision", lambda *_, **__: "fp16")
    with pytest.raises(UsageError, match="dynamic is not supported with apex: give a number"):
        resolve_flags(parse_args(["--device", "cpu", "--amp", "--loss-scale-value", "dynamic"]))


def test_fp16_without_autocast_names_apex(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "needs_apex", lambda device: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(DeviceUnavailableError, match="requires Ascend's or NVIDIA's apex with apex.amp"):
        precision.resolve_precision("gpu", [0], amp=True, opt_level="O1", amp_dtype="auto")
