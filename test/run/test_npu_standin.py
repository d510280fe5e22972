# SPDX-License-Identifier: BSD-3-Clause
"""main.py on an NPU whose operators the CPU computes: what its docstring (helpers/npu_standin/torch_npu.py) says."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from engine.versions import TORCH

from helpers.npu_standin.build import build, find_compiler
from helpers.program import Result, assert_same_weights, run_main, run_script, weights

import pytest

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(TORCH < (2, 9) or sys.platform != "linux", reason="it is for torch 2.9 and later on Linux"),
    pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler"),
]
SMALL = ["--arch", "vgg11_bn", "--image-size", 32, "-b", 6, "--lr", 0.01, "--epochs", 2, "-p", 1, "--seed", 3]
TWO = ["--multiprocessing-distributed", "--device-list", "0,1"]


@pytest.fixture(scope="module", autouse=True)
def library(request: Any) -> None:
    """The built stand-in, kept from one run of the tests to the next."""
    os.environ["NPU_STANDIN"] = build(str(request.config.cache.mkdir("npu-standin")))


def run_on_npu(*flags: Any, **options: Any) -> Result:
    result = run_script(os.path.join("test", "helpers", "small_npu.py"), "--device", "npu", *flags, **options)
    assert result.code == 0, result.err
    return result


def losses(result: Result) -> list[float]:
    """The loss of each training step."""
    return [float(loss) for loss in re.findall(r"^Epoch:.*\tLoss +([\d.]+) ", result.out, re.MULTILINE)]


@pytest.mark.parametrize("precision", [[], ["--amp", "--amp-dtype", "bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_a_training_on_an_npu_loses_what_one_on_the_cpu_does_resumes_and_evaluates(
    folder: str, tmp_path: Any, processes: list[str], precision: list[str]
) -> None:
    flags = [folder, *SMALL, *precision, *processes]
    whole, parts, cpu = tmp_path / "whole", tmp_path / "parts", tmp_path / "cpu"
    on_cpu = run_main(*flags, "--stop-step-num", 1, "--output-dir", cpu)
    trained = run_on_npu(*flags, "--output-dir", whole)
    assert len(losses(trained)) == 8
    assert losses(trained)[0] == pytest.approx(losses(on_cpu)[0], rel=1e-2 if precision else 1e-6)
    for more in (["--stop-step-num", 3], ["--auto-resume"]):
        resumed = run_on_npu(*flags, "--output-dir", parts, *more)
    assert losses(resumed) == losses(trained)[3:]
    assert_same_weights(*(weights(output / "checkpoint.pth.tar") for output in (whole, parts)))
    evaluated = run_on_npu(*flags, "-e", "--resume", whole / "checkpoint.pth.tar", "--output-dir", tmp_path)
    assert evaluated.accuracy() == trained.accuracy() == resumed.accuracy()
