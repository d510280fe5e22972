# SPDX-License-Identifier: BSD-3-Clause
"""The optimizer step: precision, loss scale, skipped steps, clipping, and their states."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

from engine.device import Amp, ComputeDevice
from engine.errors import DivergedError
from engine.options.flags import parse_args
from engine.versions import TORCH

import main
import vgg
from helpers.step import Built, Net, batch, build, optimizer_of, parameters, step

import pytest
import torch

NOT_FINITE = [float("nan"), float("inf")]
needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")


def assert_close(first: Any, second: Any) -> None:
    for mine, other in itertools.zip_longest(first, second):
        assert torch.allclose(mine, other, atol=1e-6)


def momentum(built: Built) -> list[torch.Tensor]:
    state = built.optimizer.optimizer_state_dict()["state"]
    return [state[position]["momentum_buffer"].clone() for position in sorted(state)]


# --- a step -----------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_torchs_sgd() -> None:
    built = build(weight_decay=0.01)
    torch.manual_seed(0)
    other = Net()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        step(built)
        optimizer.zero_grad()
        other(batch()).pow(2).mean().backward()
        optimizer.step()
    assert_close(built.model.parameters(), other.parameters())


@pytest.mark.parametrize("loss_scale", [8.0, "dynamic"])
def test_a_loss_scale_changes_nothing_but_rounding(loss_scale: Any) -> None:
    plain, scaled = build(), build(loss_scale=loss_scale)
    for _ in range(3):
        assert step(plain) == pytest.approx(step(scaled), abs=1e-6)
    assert_close(plain.model.parameters(), scaled.model.parameters())


@pytest.mark.parametrize("norm", [0.001, 1000.0])
@pytest.mark.parametrize("loss_scale", [None, 8.0])
def test_clipping_limits_the_norm_of_all_gradients_together(norm: float, loss_scale: Any) -> None:
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    plain, clipped = build(**options), build(**options, clip_grad_norm=norm, loss_scale=loss_scale)
    before = [weight.detach().clone() for weight in plain.model.parameters()]
    changes = []
    for built in (plain, clipped):
        step(built)
        change = [(mine.detach() - old).flatten() for mine, old in zip(built.model.parameters(), before)]
        changes.append(torch.cat(change))
    assert changes[0].norm() > 0.001  # the largest norm that is clipped here
    expected = changes[0] * min(1.0, norm / changes[0].norm().item())
    assert torch.allclose(changes[1], expected, rtol=1e-3, atol=1e-6)


# --- skipped steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", NOT_FINITE)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_a_step_with_non_finite_gradients_changes_nothing(factor: float, first: bool) -> None:
    built = build()
    if not first:
        step(built)
    before, momentum_before = parameters(built.model), momentum(built)
    step(built, factor)
    for mine, old, name in zip(parameters(built.model), before, built.model.state_dict()):
        assert torch.equal(mine, old), name
    for mine, old in itertools.zip_longest(momentum(built), momentum_before):
        assert torch.equal(mine, old)
    assert built.optimizer.skipped_in_a_row == 1
    step(built)
    assert not torch.equal(parameters(built.model)[0], before[0])
    assert built.optimizer.skipped_in_a_row == 0


def test_ten_skipped_steps_in_a_row_have_diverged() -> None:
    built = build()
    for factor in [math.nan] * 9 + [1.0] + [math.nan] * 9:
        step(built, factor)
    built.optimizer.check_finite(19)
    step(built, math.nan)
    for number in (20, 21):  # found at the next check, even if good steps came between
        with pytest.raises(DivergedError, match=rf"10 steps in a row were not finite \(found at step {number}\)"):
            built.optimizer.check_finite(number)
        step(built)


def test_the_overflows_of_a_dynamic_scale_on_its_way_down_are_no_divergence() -> None:
    built = build(loss_scale="dynamic")
    for _ in range(16):  # from 65536 to 1
        step(built, math.inf)
    built.optimizer.check_finite(16)
    for _ in range(10):
        step(built, math.inf)
    with pytest.raises(DivergedError):
        built.optimizer.check_finite(26)


# --- the dynamic loss scale -------------------------------------------------------------------------------------------


def test_the_dynamic_scale_halves_on_overflow_and_doubles_after_2000_good_steps() -> None:
    built = build(lr=0.0, loss_scale="dynamic")
    step(built, math.inf)
    assert built.optimizer.state_dict()["loss_scale"] == 32768
    built.optimizer.good_steps.fill_(1999)
    step(built)
    assert built.optimizer.state_dict()["loss_scale"] == 65536
    assert built.optimizer.state_dict()["good_steps"] == 0


def test_a_dynamic_scale_starts_anew_after_a_run_without_one() -> None:
    for loss_scale in (1.0, 8.0):
        built = build(loss_scale="dynamic")
        built.optimizer.load_state_dict(build(loss_scale=loss_scale).optimizer.state_dict())
        assert built.optimizer.state_dict()["loss_scale"] == 65536


def test_a_dynamic_scale_resumes_bit_for_bit() -> None:
    """An overflow before the checkpoint and a doubling after it: scale, counts, momentum and weights."""

    def fresh(state_dict: Any = None) -> Built:
        built = build(loss_scale="dynamic", clip_grad_norm=1.0, state_dict=state_dict)
        built.optimizer.GROWTH_INTERVAL = 3
        return built

    factors = [1, math.inf, 1, 1, 1, 1, math.nan, math.nan, 1, 1]
    whole, resumed = fresh(), fresh()
    for factor in factors:
        step(whole, factor)
    for number, factor in enumerate(factors):
        step(resumed, factor)
        if number in (3, 6):  # between two doublings, and within a run of skipped steps
            state, optimizer_state = resumed.optimizer.state_dict(), resumed.optimizer.optimizer_state_dict()
            resumed = fresh(resumed.optimizer.model_state_dict())
            resumed.optimizer.load_optimizer_state_dict(optimizer_state)
            resumed.optimizer.load_state_dict(state)
    assert whole.optimizer.state_dict() == resumed.optimizer.state_dict()
    assert whole.optimizer.state_dict()["loss_scale"] == 65536 / 2 * 2 / 4
    for mine, other in zip(parameters(whole.model) + momentum(whole), parameters(resumed.model) + momentum(resumed)):
        assert torch.equal(mine, other)


# --- optimizer state --------------------------------------------------------------------------------------------------


def test_torchs_sgd_loads_the_optimizer_state_and_gives_its_own_back() -> None:
    built = build()
    step(built)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5)
    optimizer.load_state_dict(built.optimizer.optimizer_state_dict())
    buffers = [optimizer.state[weight]["momentum_buffer"] for weight in net.parameters()]
    other = build()
    other.optimizer.load_optimizer_state_dict(optimizer.state_dict())
    for expected, loaded, returned in zip(momentum(built), buffers, momentum(other)):
        assert torch.equal(expected, loaded)
        assert torch.equal(expected, returned)


def test_an_optimizer_state_of_another_model_is_refused() -> None:
    built = build()
    step(built)
    state = built.optimizer.optimizer_state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(ValueError, match=r"parameter 0: expected shape \(8, 3, 3, 3\), got \(8, 3, 5, 5\)"):
        built.optimizer.load_optimizer_state_dict(state)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="expected the state of 6 parameters, got 5"):
        built.optimizer.load_optimizer_state_dict(state)


NO_CLASSES = SimpleNamespace(info=SimpleNamespace(classes=[], class_weights=None))
NO_DATA: Any = (main.Data(None, None, None, 0), NO_CLASSES)


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_bias_decay", [False, True])
def test_biases_and_batch_norm_can_be_left_out_of_weight_decay(no_bias_decay: bool) -> None:
    net: Any = Net()
    job: Any = SimpleNamespace(device=ComputeDevice("cpu"), comm=SimpleNamespace(world_size=1))
    job.amp, job.args = Amp(job.device), parse_args(["--lr", "0.1", "--wd", "0.5"])
    job.args.no_bias_decay = no_bias_decay
    optimizer: Any = main.build_training(job, net, None, *NO_DATA).optimizer
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        kept = no_bias_decay and parameter.dim() == 1
        assert torch.allclose(parameter, torch.tensor(1.0 if kept else 0.95)), name
    other = optimizer_of(Net(), job.amp)
    other.load_optimizer_state_dict(optimizer.optimizer_state_dict())  # momentum by position in the model
    for mine, theirs in zip(optimizer.master_weights, other.master_weights):
        buffers = [s.optimizer.state[p]["momentum_buffer"] for s, p in ((optimizer, mine), (other, theirs))]
        assert torch.equal(*buffers)


def test_the_features_can_have_a_learning_rate_of_their_own() -> None:
    """With --no-bias-decay too: each weight moves by its rate and its decay, and the checkpoint has one group."""
    net: Any = vgg.VGG("vgg11_bn", 3, [4] * 5, 4)
    job: Any = SimpleNamespace(device=ComputeDevice("cpu"), comm=SimpleNamespace(world_size=1))
    words = ["--lr", "0.1", "--momentum", "0", "--wd", "0.5", "--features-lr", "0.1", "--no-bias-decay"]
    job.amp, job.args = Amp(job.device), parse_args(words)
    job.args.clip_grad_norm = None
    optimizer: Any = main.build_training(job, net, None, *NO_DATA).optimizer
    optimizer.set_lr(0.2)
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in net.named_parameters():
        lr, gradient = 0.02 if name.startswith("features") else 0.2, 1.0 if parameter.dim() == 1 else 1.5
        assert torch.allclose(parameter, torch.tensor(1 - lr * gradient)), name
    (group,) = optimizer.optimizer_state_dict()["param_groups"]
    assert group["lr"] == 0.2 and group["weight_decay"] == 0.5 and "lr_factor" not in group


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
    saved = half.optimizer.model_state_dict()
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
    before = built.optimizer.model_state_dict()["conv.weight"].clone()
    step(built)
    after = built.optimizer.model_state_dict()["conv.weight"]
    # A change too small for bf16 is kept in the master weights.
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)


@needs_bf16
def test_o3_holds_everything_in_half_precision() -> None:
    built = build(precision="bf16", opt_level="O3")
    assert {parameter.dtype for parameter in built.model.parameters()} == {torch.bfloat16}
    assert built.model.norm.running_mean.dtype == torch.bfloat16
    assert built.optimizer.master_weights[0] is next(built.model.parameters())
