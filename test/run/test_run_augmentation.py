# SPDX-License-Identifier: BSD-3-Clause
"""Augmentation on the command line: a run continues bit for bit, and wrong use is one line."""

from __future__ import annotations

from typing import Any

from engine.versions import TORCH

from helpers.program import TWO, assert_same_weights, run_main, weights

import pytest

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


def test_flags_that_do_not_fit_the_data_are_one_line(folder: str, tmp_path: Any) -> None:
    for flags, message in (
        ([folder, "--train-scale", 16, 64], "--train-scale must be at least 32 and at most 4096, got 16"),
        ([folder, "--image-size", 64, "--train-scale", 48, 64], "at least the crop, --image-size 64, got 48"),
        (["--train-scale", 32, 64], "--train-scale are for folders of images: leave them out"),
    ):
        result = run_main(*flags, "-b", 6, "--output-dir", tmp_path)
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err
