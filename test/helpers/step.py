# SPDX-License-Identifier: BSD-3-Clause
"""A small network and its optimizer step on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.device import Amp, ComputeDevice, MixedPrecisionOptimizer

import torch
from torch import nn


class Net(nn.Module):
    """A convolution, batch norm and a linear layer: (N, 3, H, W) to logits (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(images)).mean((2, 3)))


class Built(NamedTuple):
    amp: Amp
    model: nn.Module
    optimizer: MixedPrecisionOptimizer


def build(
    *,
    precision: str = "fp32",
    opt_level: str = "O1",
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    loss_scale: Any = None,
    clip_grad_norm: float | None = None,
    state_dict: Any = None,
) -> Built:
    """Build Net, from the same weights each time, as main.py builds its model.

    loss_scale: in fp32 too. state_dict: weights to load, as a resumed run does, before the optimizer is built.
    """
    amp = Amp(ComputeDevice("cpu"), precision, opt_level)
    torch.manual_seed(0)
    net = Net()
    if state_dict is not None:
        net.load_state_dict(state_dict)
    optimizer = optimizer_of(
        net, amp, lr=lr, momentum=momentum, weight_decay=weight_decay, clip_grad_norm=clip_grad_norm
    )
    if loss_scale is not None:
        optimizer = MixedPrecisionOptimizer(
            net, optimizer.master_weights, optimizer.optimizer, loss_scale=loss_scale, clip_grad_norm=clip_grad_norm
        )
    return Built(amp, net, optimizer)


def optimizer_of(
    net: nn.Module, amp: Amp, *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-4, **options: Any
) -> MixedPrecisionOptimizer:
    """Place a network and build its optimizer as main.py's build_training does. options: of Amp.optimizer."""
    amp.device.place(net, one_shape=True)
    weights = amp.convert(net)
    sgd = torch.optim.SGD(weights, lr=lr, momentum=momentum, weight_decay=weight_decay, **amp.device.sgd_options())
    return amp.optimizer(net, sgd, weights, **options)


def batch() -> torch.Tensor:
    """The same six images each time."""
    return torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def step(built: Built, factor: float = 1.0) -> float:
    """Make one step on batch() times `factor`, and return its loss. If `factor` is not finite, no gradient is."""
    amp, model, optimizer = built
    images = batch() * factor
    with amp.autocast():
        logits = model(images.to(amp.input_dtype))
    loss = logits.float().pow(2).mean()
    optimizer.backward(loss)
    optimizer.step()
    return loss.item()


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Copies of all values of the state dict, the buffers too."""
    return [value.detach().clone() for value in model.state_dict().values()]
