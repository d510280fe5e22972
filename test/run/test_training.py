# SPDX-License-Identifier: BSD-3-Clause
"""Runs that train on other images, on more per step, or only the classifier; and what continues from them."""

from __future__ import annotations

import os
import sys
from typing import Any

from engine.checkpoints.file import load
from engine.versions import TORCH

from helpers.program import TWO, Result, assert_same_weights, run, run_main, weights
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


# --- augmentation -----------------------------------------------------------------------------------------------------


SMALL = ["--arch", "vgg11", "--image-size", "32"]
ALL = ["--train-scale", 32, 64, "--hflip", 0.3, "--color-shift", "--no-bias-decay"]
ALL_OF_TORCHVISION = ["--auto-augment", "ta_wide", "--random-erasing", 0.5, "--mixup", 0.2, "--cutmix", 1.0]


@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_a_run_with_every_augmentation_continues_bit_for_bit(folder: str, tmp_path: Any, processes: list[str]) -> None:
    flags = [folder, *SMALL, "-b", 6, "--epochs", 2, *ALL, *(ALL_OF_TORCHVISION if TORCH >= (2, 1) else []), *processes]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run_main(*flags, "--output-dir", whole)
    assert result.code == 0, result.err
    assert ("images are mixed" in result.out) == (TORCH >= (2, 1))
    path = parts / "checkpoint.pth.tar"
    for stop, workers, resume in ((2, 0, []), (100, 2, ["--resume", path])):
        result = run_main(*flags, "--output-dir", parts, "--stop-step-num", stop, "-j", workers, *resume)
        assert result.code == 0, result.err
        if stop == 2 and not processes:
            other = run_main(folder, *SMALL, "-b", 6, "--epochs", 2, "--resume", path, "--output-dir", parts)
            assert other.code == 2 and "within an epoch with augmentation train_scale [32, 64]" in other.err, other.err
    assert_same_weights(weights(whole / "checkpoint.pth.tar"), weights(path))


# --- a list of images, unbalanced classes, parts of the network -------------------------------------------------------


def test_a_list_trains_the_weights_of_the_folder_bit_for_bit_and_continues(folder: str, tmp_path: Any) -> None:
    rows = []
    for part in ("train", "val"):
        for name in sorted(os.listdir(os.path.join(folder, part))):
            images = sorted(os.listdir(os.path.join(folder, part, name)))
            rows += [f"{part}/{name}/{image}\t{name}\t{part}\n" for image in images]
    path = os.path.join(folder, "images.tsv")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(rows)
    checkpoints = [tmp_path / name / "checkpoint.pth.tar" for name in ("folder", "list")]
    flags = [*SMALL, "-b", 6, "--epochs", 2]
    try:
        results = [run_main(folder, *flags, "--output-dir", tmp_path / "folder")]
        for stop in (2, 100):
            more = ["--auto-resume", "--stop-step-num", stop, "--output-dir", tmp_path / "list"]
            results.append(run_main(path, *flags, *more))
    finally:
        os.remove(path)
    assert [result.code for result in results] == [0, 0, 0], [result.err for result in results]
    assert results[0].accuracy() == results[2].accuracy()
    assert_same_weights(*(weights(checkpoint) for checkpoint in checkpoints))


UNBALANCED = ["--class-weights", "auto", "--best", "macro_f1", "--no-bias-decay", "--label-smoothing", 0.1]
PARTS = ["--freeze-blocks", 2, "--features-lr", 0.1]


def test_a_run_with_class_weights_and_parts_of_the_network_continues_bit_for_bit(
    frozen: Any, folder: str, tmp_path: Any
) -> None:
    flags = [folder, *FLAGS, "--epochs", 1, *UNBALANCED, *PARTS, "--pretrained", frozen[0] / PRETRAINED]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, more in ((whole, []), (parts, ["--stop-step-num", 2]), (parts, ["--auto-resume"])):
        result = run_main(*flags, "--output-dir", output, *more)
        assert result.code == 0, result.err
    whole, parts = (load(str(output / "checkpoint.pth.tar")) for output in (whole, parts))
    assert_same_weights(whole["state_dict"], parts["state_dict"])
    assert whole["best_by"] == "macro_f1" and whole["class_weights"] == pytest.approx([1.0] * 3)
    assert [whole["best_value"], whole["since_best"]] == [parts["best_value"], parts["since_best"]]
    assert f"=> best macro_f1 {whole['best_value']:.3f}: " in result.out
    before = torch.load(str(frozen[0] / PRETRAINED))
    for name, tensor in whole["state_dict"].items():
        if "running" in name or (tensor.dim() > 1 and not name.startswith("classifier.6")):
            is_frozen = name.startswith("features") and int(name.split(".")[1]) < 8
            assert torch.equal(tensor, before[name]) == is_frozen, name


@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_patience_ends_a_run_and_a_resumed_one_counts_on(folder: str, tmp_path: Any, processes: list[str]) -> None:
    """A rate so small that no validation is better than the first one."""
    flags = [folder, *SMALL, "-b", 6, "--epochs", 9, "--lr", 1e-9, "--best", "balanced_acc", *processes]
    epochs = []
    for patience, resume in ((1, []), (1, ["--auto-resume"]), (2, ["--auto-resume"])):
        result = run_main(*flags, "--patience", patience, *resume, "--output-dir", tmp_path)
        assert result.code == 0, result.err
        assert f"=> stopped by --patience: {patience} validations without a better balanced_acc" in result.out
        epochs.append(load(str(tmp_path / "checkpoint.pth.tar"))["epoch"])
    assert epochs == [2, 2, 3]


# --- accumulated batches ----------------------------------------------------------------------------------------------


# small.py, whose spawned processes import this file again, without dropout.
WITHOUT_DROPOUT = """
import torch
torch.nn.Dropout = torch.nn.Identity
from helpers import small
if __name__ == "__main__":
    small.run()
"""


def test_accumulated_batches_are_one_large_batch(folder: str, tmp_path: Any) -> None:
    """12 images per step: at once, in three parts, and in three parts on each of two processes.

    The momentum of two steps, so the sum of their gradients, differs by less than a thousandth.
    """
    script = tmp_path / "without_dropout.py"
    script.write_text(WITHOUT_DROPOUT)
    flags = [folder, "--device", "cpu", "--arch", "vgg11", "--image-size", 32, "--lr", 0.1, "--stop-step-num", 2]
    momenta = []
    for name, more in (
        ("large", ["-b", 12]),
        ("accumulated", ["-b", 4, "--accum-steps", 3]),
        ("distributed", ["-b", 4, "--accum-steps", 3, *TWO]),
    ):
        result = run(sys.executable, script, *flags, *more, "--output-dir", tmp_path / name)
        assert result.code == 0, result.err
        state = load(str(tmp_path / name / "checkpoint.pth.tar"))["optimizer"]["state"]
        momenta.append(torch.cat([state[position]["momentum_buffer"].flatten() for position in sorted(state)]))
    for other in momenta[1:]:
        assert (other - momenta[0]).norm() < 1e-3 * momenta[0].norm()
