# SPDX-License-Identifier: BSD-3-Clause
"""The exponential moving average of the weights."""

from __future__ import annotations

import math

from engine.device import ModelEma
from engine.versions import TORCH

from helpers.step import build, parameters, step

import pytest
import torch

needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_the_ema_averages_the_master_weights_and_leaves_out_skipped_steps(precision: str) -> None:
    built = build(precision=precision, opt_level="O2")
    model, optimizer = built.model, built.optimizer
    ema = ModelEma(model, optimizer.weights, optimizer.master_weights)
    expected = {name: value.clone() for name, value in optimizer.model_state_dict().items()}
    for factor in (1.0, 2.0, math.nan, 1.0):
        step(built, factor)
        ema.update(0.9, 1000000, optimizer.skipped)
        if math.isfinite(factor):
            for name, value in optimizer.model_state_dict().items():
                if value.is_floating_point():
                    expected[name].mul_(0.9).add_(value * 0.1)
    averages, own = ema.state_dict(), parameters(model)
    for name, value in expected.items():
        if value.is_floating_point():
            assert averages[name].dtype == torch.float32
            assert torch.allclose(averages[name], value, atol=1e-7), name
    with ema.swapped_in():
        for name, value in model.state_dict().items():
            assert torch.equal(value, averages[name].to(value.dtype)) or not value.is_floating_point(), name
    for mine, old in zip(parameters(model), own):
        assert torch.equal(mine, old)


def test_the_first_steps_of_the_ema_decay_faster() -> None:
    built = build()
    ema = ModelEma(built.model, built.optimizer.weights, built.optimizer.master_weights)
    expected = ema.state_dict()["fc.bias"].clone()
    for number in range(1, 6):
        step(built)
        ema.update(0.4, number, built.optimizer.skipped)
        decay = (1 + number) / (10 + number) if number < 5 else 0.4  # 6/15 is 0.4 as well
        expected = decay * expected + (1 - decay) * built.optimizer.model_state_dict()["fc.bias"]
    assert torch.allclose(ema.state_dict()["fc.bias"], expected, atol=1e-6)


def test_an_ema_continues_from_its_state_dict() -> None:
    built = build()
    ema = ModelEma(built.model, built.optimizer.weights, built.optimizer.master_weights)
    step(built)
    ema.update(0.9, 1, built.optimizer.skipped)
    other = build()
    loaded = ModelEma(other.model, other.optimizer.weights, other.optimizer.master_weights)
    loaded.load_state_dict(ema.state_dict())
    for mine, old in zip(loaded.ema, ema.ema):
        assert torch.equal(mine, old)
    with pytest.raises(ValueError, match=r"EMA of fc.bias: expected shape .* got \(1,\)"):
        loaded.load_state_dict({**ema.state_dict(), "fc.bias": torch.zeros(1)})
