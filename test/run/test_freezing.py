# SPDX-License-Identifier: BSD-3-Clause
"""--freeze-features: what it trains, and what continues from it."""

from __future__ import annotations

from typing import Any

from engine.checkpoints.file import load

from helpers.program import TWO, Result, run_main, weights
from helpers.trained import FLAGS, PRETRAINED, train_classifier

import pytest
import torch


@pytest.fixture(scope="module")
def frozen(folder: str, tmp_path_factory: Any) -> tuple[Any, Result]:
    """(folder, result) of a run with --freeze-features and an EMA, from pretrained weights."""
    root = tmp_path_factory.mktemp("frozen")
    return root, train_classifier(folder, root)


def test_frozen_features_stay_and_have_no_optimizer_state(frozen: Any) -> None:
    before = torch.load(str(frozen[0] / PRETRAINED))
    checkpoint = load(str(frozen[0] / "model_best.pth.tar"))
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
    ema, after = load(str(checkpoint))["state_dict_ema"], weights(tmp_path / "checkpoint.pth.tar")
    assert torch.allclose(after["classifier.0.weight"], ema["classifier.0.weight"], atol=1e-6)
    assert torch.allclose(after["features.0.weight"], ema["features.0.weight"], atol=1e-6)
    assert len(load(str(tmp_path / "checkpoint.pth.tar"))["optimizer"]["state"]) == len(ema) - 3 * 8


def test_a_run_with_frozen_features_resumes_on_two_processes(frozen: Any, folder: str, tmp_path: Any) -> None:
    flags = [folder, *FLAGS, *TWO, "--freeze-features", "--resume", frozen[0] / "model_best.pth.tar", "--lr", 0.1]
    start = load(str(frozen[0] / "model_best.pth.tar"))["step"]
    result = run_main(*flags, "--epochs", 9, "--stop-step-num", start + 2, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "the EMA weights of the checkpoint are dropped" in result.out
    checkpoint = load(str(tmp_path / "checkpoint.pth.tar"))
    assert checkpoint["step"] == start + 2
    assert len(checkpoint["optimizer"]["state"]) == 6
    assert "state_dict_ema" not in checkpoint
    before = torch.load(str(frozen[0] / PRETRAINED))
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith("features"):
            assert torch.equal(tensor, before[name]), name
