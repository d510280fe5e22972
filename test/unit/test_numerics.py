# SPDX-License-Identifier: BSD-3-Clause
"""Half precision against fp32 from the same weights, and accumulated batches against one large batch."""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

from engine.data import ImageBatches
from engine.data.datasets import ArrayDataset, read_digits
from engine.device import Amp, MixedPrecisionOptimizer
from engine.device.choice import available_cores
from engine.device.compute import ComputeDevice
from engine.records.metrics import cross_entropy
from engine.versions import TORCH

import vgg
from helpers.step import optimizer_of

import numpy as np
import pytest
import torch
from torch import nn

NARROW = 16, 32, 64, 128, 128  # a quarter of VGG's channels
needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
HALF_PRECISION = [
    pytest.param(device, precision, opt_level, marks=needs_bf16 if device == "cpu" else on_gpu)
    for device, precision in (("cpu", "bf16"), ("gpu", "bf16"), ("gpu", "fp16"))
    for opt_level in ("O1", "O2")
]


class Trainer(NamedTuple):
    backward: Callable[..., float]  # (images, target) to the loss, which leaves gradients
    optimizer: MixedPrecisionOptimizer
    network: nn.Module


@pytest.fixture(scope="module")
def digits() -> ArrayDataset:
    return read_digits(training=True)


@pytest.fixture
def build(digits: ArrayDataset) -> Callable[..., Trainer]:
    """A function that builds a narrow VGG without dropout, from the same weights each time."""

    class NarrowVGG(vgg.VGG):
        def __init__(self, arch: str) -> None:
            nn.Module.__init__(self)  # VGG's own would initialize 100 million weights of its classifier
            self.arch, self.head = arch, "paper"
            depths = vgg.DEPTHS[arch.replace("_bn", "")]
            self.features = vgg._features(depths, NARROW, batch_norm=arch.endswith("_bn"))
            self.classifier = nn.Sequential(
                nn.Linear(NARROW[-1] * 7 * 7, 128), nn.ReLU(inplace=True), nn.Linear(128, 10)
            )
            self.features.apply(vgg._initialize)

    def builder(arch: str, device: str, precision: str, opt_level: str, lr: float = 0.0) -> Trainer:
        amp = Amp(ComputeDevice(device, local_world_size=available_cores()), precision, opt_level)  # one thread
        torch.manual_seed(3)
        network = NarrowVGG(arch)
        optimizer = optimizer_of(network, amp, lr=lr)
        colors = digits.preprocessing
        normalize = amp.device.normalizer(colors.mean, colors.std, amp.input_dtype)

        def backward(images: torch.Tensor, target: torch.Tensor) -> float:
            with amp.autocast():
                loss = cross_entropy(network(normalize(images)), amp.device.to_device(target))
            optimizer.backward(loss)
            return loss.item()

        return Trainer(backward, optimizer, network)

    return builder


def batch(digits: ArrayDataset, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, target)"""
    found = ImageBatches(digits, digits.preprocessing)[0, np.arange(first, first + count)]
    assert isinstance(found, tuple)
    return found[0], found[1]


@pytest.mark.parametrize("device, precision, opt_level", HALF_PRECISION)
def test_half_precision_has_the_loss_and_gradients_of_fp32_within_a_bound(
    build: Any, digits: ArrayDataset, device: str, precision: str, opt_level: str
) -> None:
    """The loss within 0.1%, each parameter's gradient within 35% of its norm.

    The difference grows from 0.2% in the last layer to 22% in the first: there, bf16 has chosen other maxima in five
    max-pools, and has rounded ten times.
    """
    losses, gradients = [], []
    for kind in ("fp32", precision):
        trainer = build("vgg13", device, kind, opt_level)
        losses.append(trainer.backward(*batch(digits, 0, 16)))
        gradients.append([weight.grad.float() / trainer.optimizer.scale for weight in trainer.network.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for (name, _), exact, half in zip(trainer.network.named_parameters(), *gradients):
        assert (half - exact).norm() < 0.35 * exact.norm(), name


@pytest.mark.parametrize("device, precision, opt_level", HALF_PRECISION)
def test_half_precision_learns_like_fp32_for_60_steps(
    build: Any, digits: ArrayDataset, device: str, precision: str, opt_level: str
) -> None:
    """Means of twenty losses within 0.25, while those of fp32 fall from above 1.3 to below 0.6.

    Rounding grows from step to step. From six initial weights on a CPU, the means differ by up to 0.15; means of
    ten losses by up to 0.26.
    """
    curves = []
    for kind in ("fp32", precision):
        trainer = build("vgg11_bn", device, kind, opt_level, lr=0.005)
        losses = []
        for step in range(60):
            losses.append(trainer.backward(*batch(digits, step * 24 % 1416, 24)))
            trainer.optimizer.step()
        curves.append([sum(losses[first : first + 20]) / 20 for first in range(0, 60, 20)])
    assert curves[0][0] > 1.3 and curves[0][-1] < 0.6, curves
    assert curves[1] == pytest.approx(curves[0], abs=0.25), curves
