# SPDX-License-Identifier: BSD-3-Clause
"""Whole runs on a device: traces, and on a GPU each precision, resuming, compiled, on two processes."""

from __future__ import annotations

import sys
from typing import Any

from helpers.program import MAIN, assert_same_weights, run, run_main, weights

import pytest
import torch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch, "profiler"), reason="--profile requires torch 1.8.1")
def test_a_run_too_short_for_a_trace_says_so(folder: str, tmp_path: Any) -> None:
    flags = [folder, "--arch", "vgg11", "--image-size", 32, "-b", 6, "--stop-step-num", 2, "--profile"]
    result = run_main(*flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "no trace written: the run ended within the five warm-up steps" in result.out
    assert not (tmp_path / "trace.json").exists()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("opt_level", ["O0", "O1", "O2", "O3"])
def test_a_run_on_a_gpu_learns_and_resumes(tmp_path: Any, opt_level: str, dtype: str) -> None:
    flags = ["--device", "gpu", "--arch", "vgg11", "-b", 32, "--lr", 0.01, "--amp", "--opt-level", opt_level]
    command = [sys.executable, MAIN, *flags, "--amp-dtype", dtype, "--output-dir", tmp_path]
    assert run(*command, "--stop-step-num", 5).code == 0
    result = run(*command, "--stop-step-num", 20, "--resume", tmp_path / "checkpoint.pth.tar")
    assert result.code == 0, result.err
    line = [line for line in result.out.splitlines() if line.startswith("Epoch")][-1]
    mean_loss = float(line.partition("\tLoss ")[2].partition("(")[2].partition(")")[0])
    assert mean_loss < 2.5


SHARED = ["--multiprocessing-distributed", "--device-list", "0,0", "--dist-backend", "gloo"]


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    "flags",
    [["--amp", "--ema-decay", "0.9", "-j", "2"], ["--amp", "--opt-level", "O2"], ["--compile"], ["--amp", *SHARED]],
    ids=["workers, EMA", "O2", "compiled", "two processes"],
)
def test_a_run_on_a_gpu_continues_bit_for_bit(folder: str, tmp_path: Any, flags: list[str]) -> None:
    """With --deterministic: stopped within the first epoch of four steps, it ends with the weights of a whole run."""
    flags = [folder, "--arch", "vgg11_bn", "--image-size", "32", "-b", "6", "--epochs", "2", "--deterministic", *flags]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, more in ((whole, []), (parts, ["--stop-step-num", 2]), (parts, ["--auto-resume"])):
        result = run_main(*flags, "--device", "gpu", "--output-dir", output, *more)
        assert result.code == 0, result.err
    assert_same_weights(*(weights(output / "checkpoint.pth.tar") for output in (whole, parts)))
