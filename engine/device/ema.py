# SPDX-License-Identifier: BSD-3-Clause
"""The exponential moving average (EMA) of the weights."""

from __future__ import annotations

import contextlib
from typing import Iterator

from engine.device.amp import fp32_state_dict

import torch
from torch import nn


class ModelEma:
    """An exponential moving average, in fp32, of a model's weights and of its batch norm statistics.

    Args:
        model: the model.
        weights: its trainable weights.
        master_weights: what is averaged for each of them: the weights themselves, or their fp32 master weights.
    """

    def __init__(self, model: nn.Module, weights: list[nn.Parameter], master_weights: list[torch.Tensor]) -> None:
        self.model = model
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.model_tensors: list[torch.Tensor] = [*weights, *buffers]  # what the EMA is swapped into
        self.tracked = master_weights + buffers  # what is averaged
        self.ema = [tensor.detach().to(torch.float32, copy=True) for tensor in self.tracked]

    def update(self, decay: float, step: int, skipped: torch.Tensor) -> None:
        """ema = decay · ema + (1 - decay) · weight, except after a skipped step. No synchronization.

        The first steps decay faster: min(decay, (1 + step) / (10 + step)), as TensorFlow's
        ExponentialMovingAverage(num_updates) does. skipped: () bool on the device.
        """
        with torch.no_grad():
            weight = (~skipped).float() * (1 - min(decay, (1 + step) / (10 + step)))
            for ema, tensor in zip(self.ema, self.tracked):
                ema.lerp_(tensor.float(), weight)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """A context in which the model computes with the EMA."""
        own = [tensor.data for tensor in self.model_tensors]
        for tensor, ema in zip(self.model_tensors, self.ema):
            tensor.data = ema.to(tensor.dtype)
        try:
            yield
        finally:
            for tensor, data in zip(self.model_tensors, own):
                tensor.data = data

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the model's state dict in fp32 on the CPU, with the EMA in place."""
        return fp32_state_dict(self.model, zip(self.model_tensors, self.ema))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what state_dict returned. Raises ValueError, or KeyError if a tensor is missing."""
        own = {id(tensor): ema for tensor, ema in zip(self.model_tensors, self.ema)}
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) in own:
                ema = own[id(tensor)]
                expected, got = tuple(ema.shape), tuple(state[name].shape)
                if expected != got:
                    raise ValueError(f"EMA of {name}: expected shape {expected}, got {got}")
                ema.copy_(state[name])
