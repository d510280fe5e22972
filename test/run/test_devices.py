# SPDX-License-Identifier: BSD-3-Clause
"""Programs on a device: traces, stand-ins for an NPU and for apex, and whole runs on a GPU if there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from engine.versions import TORCH

from helpers.program import MAIN, REPOSITORY, assert_same_weights, run, run_main, run_python, weights

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


# --- an NPU that computes nothing -------------------------------------------------------------------------------------

# Registers an NPU, which lasts as long as the process, and prints what main.py says of each command line and resolves
# it to. Its arguments: with or without bf16, and the flags, separated by spaces.
RESOLVE_ON_NPU = """
import json, sys
from helpers import npu_backend
npu = npu_backend.register()
from engine.errors import UserError
from engine.options import parse_flags
for case in sys.argv[1:]:
    dtype, _, flags = case.partition(" ")
    npu.bf16 = dtype == "bf16"
    print("CASE", case)
    try:
        args, _ = parse_flags(flags.split())
        print(args.device, args.device_list, args.dist_backend, args.precision, args.processes)
    except UserError as error:
        print(error)
"""
EIGHT, THREE_TWICE = "--multiprocessing-distributed -b 2048", "--multiprocessing-distributed -b 8 --device-list 3,3"
ON_NPU = {
    "fp16 " + EIGHT: "npu [0, 1, 2, 3, 4, 5, 6, 7] hccl fp32 8",
    # Two processes share a device only over gloo.
    "fp16 " + THREE_TWICE: "--device-list names a device twice: processes share one only with --dist-backend gloo",
    f"fp16 {THREE_TWICE} --dist-backend gloo": "npu [3, 3] gloo fp32 2",
    "fp16": "npu [0] hccl fp32 1",
}
if TORCH >= (1, 10):  # autocast on an NPU, with the precision it is good at
    ON_NPU.update(
        {
            "fp16 --amp " + EIGHT: "npu [0, 1, 2, 3, 4, 5, 6, 7] hccl fp16 8",
            "bf16 --amp --gpu 1 --device-list 4,5": "npu [5] hccl bf16 1",
            "bf16 --amp --gpu 6 --amp-dtype fp16": "npu [6] hccl fp16 1",
            "bf16 --amp --gpu 6 --opt-level O0": "npu [6] hccl fp32 1",
            "fp16 --amp --gpu 0 --amp-dtype bf16": "--amp-dtype bf16: this npu has no bf16; use --amp-dtype fp16",
        }
    )


@pytest.fixture(scope="module")
def resolved() -> dict[str, list[str]]:
    """{case: what was printed for it}, by one process."""
    parts = "\n".join(run_python(RESOLVE_ON_NPU, *ON_NPU)).split("CASE ")[1:]
    return {lines[0]: lines[1:] for lines in map(str.splitlines, parts)}


@pytest.mark.parametrize("case", ON_NPU)
def test_npus_are_chosen_with_their_backend_and_the_precision_they_are_good_at(resolved: Any, case: str) -> None:
    assert resolved[case][-1] == ON_NPU[case]


def test_a_run_on_one_device_says_which_of_several_it_uses(resolved: Any) -> None:
    assert resolved["fp16"][0].startswith("=> 8 devices, and this is a one-device run: using number 0;")
    assert len(resolved["fp16 " + EIGHT]) == 1


NPU = """
from helpers import npu_backend
npu = npu_backend.register(bf16=True)
from engine.device import Amp, ComputeDevice
import torch
device = ComputeDevice("npu", 7)
print(device.device, device.memory_format, npu.calls)
print(device.name())
for precision in ("fp16", "bf16"):
    with Amp(device, precision).autocast():
        print(torch.is_autocast_enabled("npu"), torch.get_autocast_dtype("npu"))
"""


@pytest.mark.skipif(TORCH < (2, 6), reason="torch before 2.6 registers no backend from Python")
def test_an_npu_gets_its_options_and_its_precision() -> None:
    device, name, *autocast = run_python(NPU)
    assert device == "npu:7 torch.contiguous_format ['set_device 7', 'jit_compile False']"
    assert name == "no NPU, a recorder"
    assert autocast == ["True torch.float16", "True torch.bfloat16"]


BROKEN_TORCH_NPU = """
raise ImportError("libascendcl.so: cannot open shared object file")
"""
METADATA = "Name: torch_npu\nVersion: 1.0\n"
ENTRY_POINT = "[torch.backends]\ntorch_npu = torch_npu:load\n"


@pytest.mark.skipif(TORCH < (2, 5), reason="torch before 2.5 loads no backend by itself")
def test_torch_npu_without_cann_does_not_keep_a_script_from_starting(tmp_path: Any) -> None:
    (tmp_path / "torch_npu.py").write_text(BROKEN_TORCH_NPU)
    info = tmp_path / "torch_npu-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    # Without the variable, which the tests' own environment has.
    env = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    env["PYTHONPATH"] = str(tmp_path)

    def imports(code: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], env=env, cwd=REPOSITORY, capture_output=True, text=True)

    assert "libascendcl.so" in imports("import torch").stderr
    for script in ("main", "predict", "export"):
        result = imports(f"import {script}, torch; print(torch.ones(2).sum())")
        assert result.stdout == "tensor(2.)\n", result.stderr


# --- apex -------------------------------------------------------------------------------------------------------------

# Stands in for Ascend's apex.amp, and scales for real.
APEX_AMP = """
import contextlib
calls = []

def initialize(model, optimizer, **options):
    calls.append(options)
    return model, optimizer

def master_params(optimizer):
    return (parameter for group in optimizer.param_groups for parameter in group["params"])

@contextlib.contextmanager
def scale_loss(loss, optimizer):
    yield loss * 8
    for parameter in master_params(optimizer):
        parameter.grad.div_(8)
"""


STEP_WITH_APEX = """
import json
from engine.device import ComputeDevice, amp
from apex import amp as apex_amp
import torch
amp.needs_apex = lambda device: True
for no_bias_decay in (False, True):
    precision = amp.Amp(ComputeDevice("cpu"), "fp16", "O2")
    network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
    weights = precision.convert(network)
    groups = [{"params": weights[::2]}, {"params": weights[1::2]}] if no_bias_decay else [{"params": weights}]
    sgd = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    optimizer = precision.optimizer(network, sgd, weights, loss_scale=8.0)
    network[1].weight.data.fill_(1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with precision.autocast():
        loss = network(torch.tensor([[1.0, 3.0]])).sum()
    optimizer.backward(loss)
    optimizer.step()
    change = [(old - new.detach()).flatten().tolist() for old, new in zip(before, network.parameters())]
    masters = [id(one) == id(other) for one, other in zip(optimizer.master_weights, network.parameters())]
    print(json.dumps([apex_amp.calls.pop(), change[0], masters]))
"""


def test_apex_is_called_as_it_documents_and_leaves_unscaled_gradients(tmp_path: Any) -> None:
    """With one group of parameters, and with one without weight decay."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "amp.py").write_text(APEX_AMP)
    lines = run_python(STEP_WITH_APEX, PYTHONPATH=os.pathsep.join([REPOSITORY, str(tmp_path)]))
    assert len(lines) == 2
    for calls, change, masters in map(json.loads, lines):
        assert calls == {"opt_level": "O2", "loss_scale": 8.0, "verbosity": 0}
        assert change == [pytest.approx(0.5), pytest.approx(1.5)]
        assert masters == [True] * 4  # in the model's order, though apex lists them by parameter group


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
