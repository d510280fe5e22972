# SPDX-License-Identifier: BSD-3-Clause
"""What the step does on one device: precision, memory format, normalization, apex, copies, traces."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

from engine.device import Amp, ComputeDevice
from engine.options.flags import parse_args
from engine.records.logger import ProgressMeter
from engine.versions import TORCH

import main
import vgg
from helpers.fake_gpu import fake_gpu

import pytest
import torch

needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


# --- devices that are not there ---------------------------------------------------------------------------------------


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
    precision = "fp32" if args.opt_level == "O0" else dtype
    with fake_gpu(monkeypatch) as copied:
        device = ComputeDevice("gpu")
        amp = Amp(device, precision, args.opt_level)
        with torch.device("cuda", 0):
            network = vgg.VGG(args.arch, 10)
        normalize = device.normalizer((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), amp.input_dtype)
        comm: Any = SimpleNamespace(rank=0, world_size=1)
        job: Any = SimpleNamespace(args=args, device=device, amp=amp, comm=comm)
        checkpointer: Any = SimpleNamespace(info=SimpleNamespace(classes=range(10), class_weights=None))
        training = main.build_training(job, network, normalize, main.Data(None, None, None, 64), checkpointer)
        batch = torch.zeros(8, 64, 64, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), torch.arange(8)
        copied.clear()
        for _ in range(3):
            main.train_step(job, training, itertools.repeat(batch), ProgressMeter("", 3))
        assert copied == [torch.uint8, torch.int64] * 3 * args.accum_steps
        with pytest.raises(Exception, match="_local_scalar_dense"):
            training.counter.read()
    assert training.state.step == 3


@pytest.mark.parametrize("library", ["torch_npu.optim", "apex.optimizers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_npu_fuses_sgd_for_the_precisions_that_its_optimizer_takes(
    monkeypatch: Any, dtype: torch.dtype, library: str
) -> None:
    """From torch_npu, or from Ascend's apex, as on torch 1.5."""
    package, _, module = library.partition(".")
    optimizers = SimpleNamespace(NpuFusedSGD=FusedSGD)
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{module: optimizers}))
    monkeypatch.setitem(sys.modules, library, optimizers)
    device = ComputeDevice("cpu")
    device.type = "npu"
    weight = torch.zeros(2, dtype=dtype, requires_grad=True)
    sgd = torch.optim.SGD([{"params": [weight], "weight_decay": 0.5}], lr=0.1, momentum=0.9)
    fused = device.prepare_sgd(sgd)
    assert isinstance(fused, FusedSGD) == (dtype != torch.bfloat16)
    assert [fused.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.9, 0.5]


def test_an_npu_without_fused_sgd_says_so(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    device = ComputeDevice("cpu")
    device.type = "npu"
    sgd = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    assert device.prepare_sgd(sgd) is sgd
    assert "NpuFusedSGD" in capsys.readouterr().out


class FusedSGD(torch.optim.SGD):
    """A stand-in for torch_npu.optim.NpuFusedSGD, which raises TypeError for bf16."""


@pytest.mark.skipif(TORCH < (1, 12), reason="torch before 1.12 has no MPS")
def test_mps_has_no_channels_last() -> None:
    """Its pooling and batch norm are broken there, in the backward pass."""
    assert ComputeDevice("mps").memory_format == torch.contiguous_format
    assert ComputeDevice("cpu").memory_format == torch.channels_last


# --- images -----------------------------------------------------------------------------------------------------------


def test_bytes_of_images_become_normalized_channels() -> None:
    device = ComputeDevice("cpu")
    images = torch.arange(2 * 5 * 5 * 3).view(2, 5, 5, 3).byte()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = device.normalizer(mean, std)(images)
    expected = ((images.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    assert torch.allclose(normalized, expected, atol=1e-6)
    assert normalized.dtype == torch.float32
    assert normalized.is_contiguous(memory_format=device.memory_format)


@needs_bf16
def test_images_have_the_precision_of_the_weights() -> None:
    images = torch.zeros(1, 5, 5, 3, dtype=torch.uint8)
    for opt_level, dtype in (("O1", torch.float32), ("O2", torch.bfloat16), ("O3", torch.bfloat16)):
        amp = Amp(ComputeDevice("cpu"), "bf16", opt_level)
        assert amp.device.normalizer((0.5,) * 3, (0.5,) * 3, amp.input_dtype)(images).dtype == dtype


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@no_gpu
def test_batches_copied_beside_a_busy_gpu_arrive_intact() -> None:
    """Each batch is used after a matrix product that takes longer than its copy, and freed at once."""
    device = ComputeDevice("gpu")
    busy, sums = torch.randn(4096, 4096, device=device.device), []
    for number in range(40):
        images = device.to_device(torch.full((64, 224, 224, 3), number, dtype=torch.uint8).pin_memory())
        busy = (busy @ busy).clamp(-1, 1)
        sums.append(images.sum())
        del images
    assert [total.item() for total in sums] == [number * 64 * 224 * 224 * 3 for number in range(40)]
