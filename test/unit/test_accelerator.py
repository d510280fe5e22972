# SPDX-License-Identifier: BSD-3-Clause
"""What the step does on one device: precision, memory format, normalization, apex, copies, traces."""

from __future__ import annotations

import itertools
import json
import os
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import main
import vgg
from engine.checkpoints.contents import ModelInfo
from engine.device.compute import ComputeDevice
from engine.options.flags import parse_args
from engine.records.logger import ProgressMeter
from engine.versions import TORCH
from helpers.fake_gpu import fake_gpu
from helpers.program import MAIN, REPOSITORY, assert_same_weights, run, run_main, run_python, weights
from helpers.step import build, step

import pytest
import torch

needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


# --- devices that are not there ---------------------------------------------------------------------------------------

NPU = """
import sys
from helpers import npu_backend
npu = npu_backend.register(bf16=True)
from engine.device.compute import ComputeDevice
import torch
accelerator = ComputeDevice("npu", 7, precision=sys.argv[1])
print(accelerator.device, accelerator.memory_format, npu.calls, npu.config.allow_internal_format)
print(accelerator.name())
with accelerator.autocast():
    print(torch.is_autocast_enabled("npu"), torch.get_autocast_dtype("npu"))
"""


@pytest.mark.skipif(TORCH < (2, 6), reason="torch before 2.6 registers no backend from Python")
@pytest.mark.parametrize("precision, dtype", [("fp16", "torch.float16"), ("bf16", "torch.bfloat16")])
def test_an_npu_gets_its_options_and_its_precision(precision: str, dtype: str) -> None:
    device, name, autocast = run_python(NPU, precision)
    assert device == "npu:7 torch.contiguous_format ['set_device 7', 'jit_compile False'] True"
    assert name == "no NPU, a recorder"
    assert autocast == f"True {dtype}"


@pytest.mark.skipif(TORCH < (2, 4), reason="torch before 2.4 has no fused SGD that skips on the device")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--opt-level", "O0", "--arch", "vgg16"],
        ["--opt-level", "O1", "--arch", "vgg11_bn", "--label-smoothing", "0.1", "--no-bias-decay"],
        ["--opt-level", "O2", "--arch", "vgg11_bn", "--ema-decay", "0.9", "--clip-grad-norm", "1"],
        ["--opt-level", "O3", "--arch", "vgg13", "--accum-steps", "2", "--loss-scale-value", "dynamic"],
    ],
    ids=lambda flags: flags[1],
)
def test_a_step_on_a_gpu_copies_its_batch_there_and_reads_nothing_back(
    monkeypatch: Any, flags: list[str], dtype: str
) -> None:
    """So the host can run ahead of the GPU. Reading any value back would be an error here."""
    args = parse_args(["--dummy", "64", "-b", "8", "--image-size", "64", "--device", "gpu", *flags])
    args.nodes = args.processes = 1
    group: Any = SimpleNamespace(rank=0, world_size=1)
    precision = "fp32" if args.opt_level == "O0" else dtype
    with fake_gpu(monkeypatch) as copied:
        accelerator = ComputeDevice("gpu", precision=precision, opt_level=args.opt_level)
        with torch.device("cuda", 0):
            network = vgg.VGG(args.arch, 10)
        info = ModelInfo(args.arch, [str(number) for number in range(10)], {}, 1)
        normalize = accelerator.normalizer((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
        runtime: Any = SimpleNamespace(accelerator=accelerator, group=group)
        training = main.build_training(network, info, normalize, args, runtime)
        batch = torch.zeros(8, 64, 64, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), torch.arange(8)
        copied.clear()
        for _ in range(3):
            main.train_step(args, runtime, training, itertools.repeat(batch), ProgressMeter("", 3))
        assert copied == [torch.uint8, torch.int64] * 3 * args.accum_steps
        with pytest.raises(Exception, match="_local_scalar_dense"):
            training.counter.read()
    assert training.state.step == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_npu_fuses_sgd_for_the_precisions_that_its_optimizer_takes(monkeypatch: Any, dtype: torch.dtype) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(optim=SimpleNamespace(NpuFusedSGD=FusedSGD)))
    accelerator = ComputeDevice("cpu")
    accelerator.type = "npu"
    groups = [{"params": [torch.zeros(2, dtype=dtype, requires_grad=True)]}]
    optimizer = accelerator._build_sgd(groups, lr=0.1, momentum=0.9, weight_decay=0.0)
    assert isinstance(optimizer, FusedSGD) == (dtype != torch.bfloat16)


class FusedSGD(torch.optim.SGD):
    """A stand-in for torch_npu.optim.NpuFusedSGD, which raises TypeError for bf16."""


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
import sys
import engine.device.compute
from apex import amp
import torch
engine.device.compute.needs_apex = lambda device: True
accelerator = engine.device.compute.ComputeDevice("cpu", precision="fp16", opt_level="O2")
network = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Linear(1, 1))
options = {"no_bias_decay": sys.argv[1] == "True", "loss_scale": 8.0}
scaler = accelerator.prepare_training(network, lr=0.5, momentum=0.9, weight_decay=0.0, **options)
network[1].weight.data.fill_(1)
before = [parameter.detach().clone() for parameter in network.parameters()]
with accelerator.autocast():
    loss = network(torch.tensor([[1.0, 3.0]])).sum()
scaler.backward(loss)
scaler.step()
change = [(old - new.detach()).flatten().tolist() for old, new in zip(before, network.parameters())]
masters = [id(master) == id(parameter) for master, parameter in zip(scaler.master_weights, network.parameters())]
print(json.dumps([amp.calls, change[0], masters]))
"""


@pytest.mark.parametrize("no_bias_decay", [False, True])
def test_apex_is_called_as_it_documents_and_leaves_unscaled_gradients(tmp_path: Any, no_bias_decay: bool) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    (tmp_path / "apex" / "amp.py").write_text(textwrap.dedent(APEX_AMP))
    path = os.pathsep.join([REPOSITORY, str(tmp_path)])
    calls, change, masters = json.loads(run_python(STEP_WITH_APEX, str(no_bias_decay), PYTHONPATH=path)[-1])
    assert calls == [{"opt_level": "O2", "loss_scale": 8.0, "verbosity": 0}]
    assert change == [pytest.approx(0.5), pytest.approx(1.5)]
    assert masters == [True] * 4  # in the model's order, though apex lists them by parameter group


# --- precision --------------------------------------------------------------------------------------------------------


@needs_bf16
@pytest.mark.parametrize("opt_level, tolerance", [("O1", 0.1), ("O2", 0.1), ("O3", 0.3)])
def test_bf16_follows_fp32(opt_level: str, tolerance: float) -> None:
    """The weights after five steps, relative to how far fp32 moved them."""
    exact, half = build(), build(precision="bf16", opt_level=opt_level)
    start = [weight.detach().clone() for weight in exact.model.parameters()]
    for _ in range(5):
        step(exact)
        step(half)
    saved = half.scaler.model_state_dict()
    after = dict(exact.model.named_parameters())
    moved = torch.cat([(weight - old).flatten() for weight, old in zip(after.values(), start)]).norm()
    apart = torch.cat([(saved[name] - weight).flatten() for name, weight in after.items()]).norm()
    assert apart / moved < tolerance
    assert all(value.dtype in (torch.float32, torch.int64) for value in saved.values())


@needs_bf16
def test_o2_holds_half_precision_weights_fp32_batch_norm_and_master_weights() -> None:
    built = build(precision="bf16", opt_level="O2", lr=1e-5)
    assert built.model.conv.weight.dtype == torch.bfloat16
    assert built.model.norm.weight.dtype == torch.float32
    before = built.scaler.model_state_dict()["conv.weight"].clone()
    step(built)
    after = built.scaler.model_state_dict()["conv.weight"]
    # A change too small for bf16 is kept in the master weights.
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)


@needs_bf16
def test_o3_holds_everything_in_half_precision() -> None:
    built = build(precision="bf16", opt_level="O3")
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.bfloat16}
    assert built.model.norm.running_mean.dtype == torch.bfloat16
    assert built.scaler.master_weights[0] is next(built.model.parameters())


# --- images -----------------------------------------------------------------------------------------------------------


def test_bytes_of_images_become_normalized_channels() -> None:
    accelerator = ComputeDevice("cpu")
    images = torch.arange(2 * 5 * 5 * 3).view(2, 5, 5, 3).byte()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = accelerator.normalizer(mean, std)(images)
    expected = ((images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    assert torch.allclose(normalized, expected, atol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=accelerator.memory_format)


@needs_bf16
def test_images_have_the_precision_of_the_weights() -> None:
    images = torch.zeros(1, 5, 5, 3, dtype=torch.uint8)
    for opt_level, dtype in (("O1", torch.float32), ("O2", torch.bfloat16), ("O3", torch.bfloat16)):
        accelerator = ComputeDevice("cpu", precision="bf16", opt_level=opt_level)
        assert accelerator.normalizer((0.5,) * 3, (0.5,) * 3)(images).dtype == dtype


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
def test_batches_copied_beside_a_busy_gpu_arrive_intact() -> None:
    """Each batch is used after a matrix product that takes longer than its copy, and freed at once."""
    accelerator = ComputeDevice("gpu")
    busy, sums = torch.randn(4096, 4096, device=accelerator.device), []
    for number in range(40):
        images = accelerator.to_device(torch.full((64, 224, 224, 3), number, dtype=torch.uint8).pin_memory())
        busy = (busy @ busy).clamp(-1, 1)
        sums.append(images.sum())
        del images
    assert [total.item() for total in sums] == [number * 64 * 224 * 224 * 3 for number in range(40)]


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
