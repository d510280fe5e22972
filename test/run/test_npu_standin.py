# SPDX-License-Identifier: BSD-3-Clause
"""main.py on an NPU whose operators the CPU computes: what its docstring (helpers/npu_standin/torch_npu.py) says."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from engine.versions import TORCH

from helpers.npu_standin.build import build, find_compiler
from helpers.program import REPOSITORY, Result, assert_same_weights, run_main, run_python, run_script, weights

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


BF16 = ["--amp", "--amp-dtype", "bf16"]


@pytest.mark.parametrize(
    "precision, processes", [([], []), (BF16, []), ([], TWO)], ids=["fp32", "bf16", "fp32, two processes"]
)
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
    flags = [folder, *SMALL, *precision, "-e", "--output-dir", tmp_path]
    evaluated = run_on_npu(*flags, "--resume", whole / "checkpoint.pth.tar")
    assert evaluated.accuracy() == trained.accuracy() == resumed.accuracy()


# Makes steps with the flags of each argument; prints the operators of the last one, their types and how often each ran.
OPERATORS = """
import itertools, os, sys
sys.path.insert(0, os.path.join(sys.argv[1], "test", "helpers", "npu_standin"))
from types import SimpleNamespace
from engine.device import Amp, ComputeDevice
from engine.options.flags import parse_args
from engine.records.logger import ProgressMeter
from helpers.small import small_vgg
import main
import torch, torch_npu
device = ComputeDevice("npu")
for words in sys.argv[2:]:
    precision, *flags = words.split()
    args = parse_args(["--dummy", "8", "-b", "8", "--image-size", "32", "--device", "npu", "-a", "vgg11_bn", *flags])
    args.nodes = args.processes = 1
    amp = Amp(device, precision, args.opt_level)
    network = small_vgg(args.arch, 10)
    normalize = device.normalizer((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), amp.input_dtype)
    job = SimpleNamespace(args=args, device=device, amp=amp, comm=SimpleNamespace(rank=0, world_size=1))
    checkpointer = SimpleNamespace(info=SimpleNamespace(classes=range(10), class_weights=None))
    training = main.build_training(job, network, normalize, main.Data(None, None, None, 8), checkpointer)
    count = 8 + bool(args.mixup)
    batch = torch.zeros(count, 32, 32, 3, dtype=torch.uint8), torch.arange(count), torch.arange(count)
    for _ in range(2):
        torch.ops.npu_standin.take_calls()
        main.train_step(job, training, itertools.repeat(batch), ProgressMeter("", 9))
    print("CASE", words, *torch.ops.npu_standin.take_calls(), sep="\\n")
"""
CASES = [
    "fp32 --opt-level O0",
    "fp16 --opt-level O1 --label-smoothing 0.1 --loss-scale-value dynamic --accum-steps 2 --mixup 0.2 --cutmix 1",
    "bf16 --opt-level O2 --ema-decay 0.9 --clip-grad-norm 1",
    "bf16 --opt-level O3",
]


def test_the_operators_of_a_step_are_those_that_the_documentation_lists() -> None:
    """With none of the _foreach family, and one reading by the host: whether to skip the step."""
    lines = run_python(OPERATORS, REPOSITORY, *CASES)
    assert [line for line in lines if line in CASES] == CASES
    copies = [line.rpartition(" ")[0] for line in lines if line.startswith(("copy", "read"))]
    assert set(copies) == {
        "copy to the npu Byte",
        "copy to the npu Long",
        "read by the host (_local_scalar_dense) Bool",
    }
    assert [line.split()[-1] for line in lines if line.startswith("read")] == ["1"] * len(CASES)
    used = {match[1] for match in map(re.compile(r"aten::(\w+)").match, lines) if match}
    with open(os.path.join(REPOSITORY, "docs", "npu.md"), encoding="utf-8") as file:
        rows = [line for line in file if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert used - {"_local_scalar_dense"} == listed
