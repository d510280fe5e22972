# SPDX-License-Identifier: BSD-3-Clause
"""The optimizer step: loss scale, skipped steps, clipping, the EMA, and their states."""

from __future__ import annotations

import itertools
import math
from typing import Any

from engine.checkpoints.contents import load_checkpoint, model_weights
from engine.device.compute import ComputeDevice
from engine.device.step import ModelEma
from engine.errors import DivergedError
from engine.versions import TORCH
from helpers.program import TWO, Result, run_main, weights
from helpers.step import Built, Net, batch, build, parameters, step
from helpers.trained import FLAGS, PRETRAINED, train_classifier

import pytest
import torch

NOT_FINITE = [float("nan"), float("inf")]
needs_bf16 = pytest.mark.skipif(TORCH < (2, 1), reason="bf16 on a CPU as tested here requires torch 2.1")


def assert_close(first: Any, second: Any) -> None:
    for mine, other in itertools.zip_longest(first, second):
        assert torch.allclose(mine, other, atol=1e-6)


def momentum(built: Built) -> list[torch.Tensor]:
    state = built.scaler.optimizer_state_dict()["state"]
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
    assert built.scaler.read_longest_skip() == 1
    step(built)
    assert not torch.equal(parameters(built.model)[0], before[0])
    assert built.scaler.read_longest_skip() <= 1
    assert built.scaler.read_longest_skip() == 0


def test_ten_skipped_steps_in_a_row_have_diverged() -> None:
    built = build()
    for factor in [math.nan] * 9 + [1.0] + [math.nan] * 9:
        step(built, factor)
    built.scaler.check_finite(19)
    step(built, math.nan)
    with pytest.raises(DivergedError, match=r"10 steps in a row were not finite \(found at step 20\)"):
        built.scaler.check_finite(20)


def test_the_overflows_of_a_dynamic_scale_on_its_way_down_are_no_divergence() -> None:
    built = build(loss_scale="dynamic")
    for _ in range(16):  # from 65536 to 1
        step(built, math.inf)
    built.scaler.check_finite(16)
    for _ in range(10):
        step(built, math.inf)
    with pytest.raises(DivergedError):
        built.scaler.check_finite(26)


# --- the dynamic loss scale -------------------------------------------------------------------------------------------


def test_the_dynamic_scale_halves_on_overflow_and_doubles_after_2000_good_steps() -> None:
    built = build(lr=0.0, loss_scale="dynamic")
    step(built, math.inf)
    assert built.scaler.state_dict()["loss_scale"] == 32768
    built.scaler.good_steps.fill_(1999)
    step(built)
    assert built.scaler.state_dict()["loss_scale"] == 65536
    assert built.scaler.state_dict()["good_steps"] == 0


def test_a_dynamic_scale_starts_anew_after_a_run_without_one() -> None:
    for loss_scale in (1.0, 8.0):
        built = build(loss_scale="dynamic")
        built.scaler.load_state_dict(build(loss_scale=loss_scale).scaler.state_dict())
        assert built.scaler.state_dict()["loss_scale"] == 65536


def test_a_dynamic_scale_resumes_bit_for_bit() -> None:
    """An overflow before the checkpoint and a doubling after it: scale, counts, momentum and weights."""

    def fresh(state_dict: Any = None) -> Built:
        built = build(loss_scale="dynamic", clip_grad_norm=1.0, state_dict=state_dict)
        built.scaler.GROWTH_INTERVAL = 3
        return built

    factors = [1, math.inf, 1, 1, 1, 1, math.nan, math.nan, 1, 1]
    whole, resumed = fresh(), fresh()
    for factor in factors:
        step(whole, factor)
    for number, factor in enumerate(factors):
        step(resumed, factor)
        if number in (3, 6):  # between two doublings, and within a run of skipped steps
            state, optimizer_state = resumed.scaler.state_dict(), resumed.scaler.optimizer_state_dict()
            resumed = fresh(resumed.scaler.model_state_dict())
            resumed.scaler.load_optimizer_state_dict(optimizer_state)
            resumed.scaler.load_state_dict(state)
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    assert whole.scaler.state_dict()["loss_scale"] == 65536 / 2 * 2 / 4
    for mine, other in zip(parameters(whole.model) + momentum(whole), parameters(resumed.model) + momentum(resumed)):
        assert torch.equal(mine, other)


# --- optimizer state --------------------------------------------------------------------------------------------------


def test_torchs_sgd_loads_the_optimizer_state_and_gives_its_own_back() -> None:
    built = build()
    step(built)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.5)
    optimizer.load_state_dict(built.scaler.optimizer_state_dict())
    buffers = [optimizer.state[weight]["momentum_buffer"] for weight in net.parameters()]
    other = build()
    other.scaler.load_optimizer_state_dict(optimizer.state_dict())
    for expected, loaded, returned in zip(momentum(built), buffers, momentum(other)):
        assert torch.equal(expected, loaded)
        assert torch.equal(expected, returned)


def test_an_optimizer_state_of_another_model_is_refused() -> None:
    built = build()
    step(built)
    state = built.scaler.optimizer_state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(8, 3, 5, 5)
    with pytest.raises(ValueError, match=r"parameter 0: expected shape \(8, 3, 3, 3\), got \(8, 3, 5, 5\)"):
        built.scaler.load_optimizer_state_dict(state)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="expected the state of 6 parameters, got 5"):
        built.scaler.load_optimizer_state_dict(state)


# --- the EMA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_the_ema_averages_the_master_weights_and_leaves_out_skipped_steps(precision: str) -> None:
    built = build(precision=precision, opt_level="O2")
    model, scaler = built.model, built.scaler
    ema = ModelEma(model, scaler.weights, scaler.master_weights)
    expected = {name: value.clone() for name, value in scaler.model_state_dict().items()}
    for factor in (1.0, 2.0, math.nan, 1.0):
        step(built, factor)
        ema.update(0.9, 1000000, scaler.skipped)
        if math.isfinite(factor):
            for name, value in scaler.model_state_dict().items():
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
    ema = ModelEma(built.model, built.scaler.weights, built.scaler.master_weights)
    expected = ema.state_dict()["fc.bias"].clone()
    for number in range(1, 6):
        step(built)
        ema.update(0.4, number, built.scaler.skipped)
        decay = (1 + number) / (10 + number) if number < 5 else 0.4  # 6/15 is 0.4 as well
        expected = decay * expected + (1 - decay) * built.scaler.model_state_dict()["fc.bias"]
    assert torch.allclose(ema.state_dict()["fc.bias"], expected, atol=1e-6)


def test_an_ema_continues_from_its_state_dict() -> None:
    built = build()
    ema = ModelEma(built.model, built.scaler.weights, built.scaler.master_weights)
    step(built)
    ema.update(0.9, 1, built.scaler.skipped)
    other = build()
    loaded = ModelEma(other.model, other.scaler.weights, other.scaler.master_weights)
    loaded.load_state_dict(ema.state_dict())
    for mine, old in zip(loaded.ema, ema.ema):
        assert torch.equal(mine, old)
    with pytest.raises(ValueError, match=r"EMA of fc.bias: expected shape .* got \(1,\)"):
        loaded.load_state_dict({**ema.state_dict(), "fc.bias": torch.zeros(1)})


# --- weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_bias_decay", [False, True])
def test_biases_and_batch_norm_can_be_left_out_of_weight_decay(no_bias_decay: bool) -> None:
    net = Net()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "no_bias_decay": no_bias_decay}
    scaler = ComputeDevice("cpu").prepare_training(net, **options)
    for parameter in net.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    scaler.step()
    for name, parameter in net.named_parameters():
        kept = no_bias_decay and parameter.dim() == 1
        assert torch.allclose(parameter, torch.tensor(1.0 if kept else 0.95)), name
    other = ComputeDevice("cpu").prepare_training(Net(), **{**options, "no_bias_decay": False})
    other.load_optimizer_state_dict(scaler.optimizer_state_dict())  # momentum by position in the model
    for mine, theirs in zip(scaler.master_weights, other.master_weights):
        buffers = [s.optimizer.state[p]["momentum_buffer"] for s, p in ((scaler, mine), (other, theirs))]
        assert torch.equal(*buffers)


# --- frozen features --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen(folder: str, tmp_path_factory: Any) -> tuple[Any, Result]:
    """(folder, result) of a run with --freeze-features and an EMA, from pretrained weights."""
    root = tmp_path_factory.mktemp("frozen")
    return root, train_classifier(folder, root)


def test_frozen_features_stay_and_have_no_optimizer_state(frozen: Any) -> None:
    before = torch.load(str(frozen[0] / PRETRAINED))
    checkpoint = load_checkpoint(str(frozen[0] / "model_best.pth.tar"))
    for key in ("state_dict", "state_dict_ema"):
        for name, tensor in checkpoint[key].items():
            if name.startswith("features"):
                assert torch.equal(tensor, before[name]), (key, name)
        assert not torch.equal(checkpoint[key]["classifier.0.weight"], before["classifier.0.weight"])
    assert len(checkpoint["optimizer"]["state"]) == 6


def test_a_run_from_frozen_features_trains_all_layers_from_the_ema_weights(
    frozen: Any, folder: str, tmp_path: Any
) -> None:
    checkpoint = frozen[0] / "model_best.pth.tar"
    flags = [folder, *FLAGS, "--pretrained", checkpoint, "--epochs", 1, "--stop-step-num", 1, "--lr", 1e-9]
    result = run_main(*flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert f"loaded the EMA weights of '{checkpoint}'" in result.out
    ema, after = model_weights(load_checkpoint(str(checkpoint)), ""), weights(tmp_path / "checkpoint.pth.tar")
    assert_close(after["classifier.0.weight"], ema["classifier.0.weight"])
    assert_close(after["features.0.weight"], ema["features.0.weight"])
    assert len(load_checkpoint(str(tmp_path / "checkpoint.pth.tar"))["optimizer"]["state"]) == len(ema) - 3 * 8


def test_a_run_with_frozen_features_resumes_on_two_processes(frozen: Any, folder: str, tmp_path: Any) -> None:
    flags = [folder, *FLAGS, *TWO, "--freeze-features", "--resume", frozen[0] / "model_best.pth.tar", "--lr", 0.1]
    start = load_checkpoint(str(frozen[0] / "model_best.pth.tar"))["step"]
    result = run_main(*flags, "--epochs", 9, "--stop-step-num", start + 2, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "the EMA weights of the checkpoint are dropped" in result.out
    checkpoint = load_checkpoint(str(tmp_path / "checkpoint.pth.tar"))
    assert checkpoint["step"] == start + 2
    assert len(checkpoint["optimizer"]["state"]) == 6
    assert "state_dict_ema" not in checkpoint
    before = torch.load(str(frozen[0] / PRETRAINED))
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith("features"):
            assert torch.equal(tensor, before[name]), name
