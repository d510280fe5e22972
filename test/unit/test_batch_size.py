# SPDX-License-Identifier: BSD-3-Clause
"""The default of --batch-size for few images and little memory."""

from __future__ import annotations

import math
from argparse import Namespace
from typing import Any

from engine.checkpoints import Checkpoint, RunInfo
from engine.errors import UsageError
from engine.options.batch_size import default_batch_size
from engine.options.flags import parse_args
from engine.options.resolve import shared_flags, with_checkpoint
from engine.records import run_info

import vgg

import pytest

GB = 1e9


def flags(*words: Any, nodes: int = 1, processes: int = 1, precision: str = "fp32") -> Namespace:
    args = parse_args([str(word) for word in words])
    args.nodes, args.processes, args.precision = nodes, processes, precision
    return args


@pytest.mark.parametrize("images", [1, 2, 5, 8, 24, 80, 500, 1281, 5119, 5120, 50000, 1281167])
@pytest.mark.parametrize("nodes, processes", [(1, 1), (1, 2), (2, 1), (1, 3), (2, 8)])
@pytest.mark.parametrize("size, memory", [(32, 4), (64, 16), (224, 4), (224, 16), (224, math.inf)])
def test_the_default_batch_fits_the_images_and_the_memory(
    tmp_path: Any, images: int, nodes: int, processes: int, size: int, memory: float
) -> None:
    args = flags(tmp_path, "--lr", 0.01, nodes=nodes, processes=processes)
    chosen = with_checkpoint(args, None, images, size, memory * GB)[0].batch_size
    share = chosen // processes
    assert chosen % processes == 0 and share & (share - 1) == 0 and share >= 1 and chosen <= 256
    if share > 1:
        assert chosen * nodes <= max(images / 20, min(images, 8))
        # Measured for VGG16 in fp32; a process has weights, gradients and momentum of its own.
        assert chosen * 145e6 * (size / 224) ** 2 + 1.7 * GB * (processes - 1) <= memory * GB / 2
    if images >= 5120 * nodes and memory == math.inf and processes in (1, 2, 8):
        assert chosen == 256
    assert args.batch_size == 256  # the flags stay as they are


@pytest.mark.parametrize("given", [1, 7, 256, 999])
def test_a_batch_size_that_is_given_counts(tmp_path: Any, given: int, capsys: Any) -> None:
    args, batch = with_checkpoint(flags(tmp_path, "-b", given, "--lr", 1), None, 500, 224, 2 * GB)
    assert args.batch_size == batch["images_per_step"] == given and capsys.readouterr().out == ""


def test_the_choice_is_one_line_that_says_why(tmp_path: Any, capsys: Any) -> None:
    for images, memory, reason in ((500, 64, "500 images"), (10**6, 8, "8.0 GB")):
        chosen = with_checkpoint(flags(tmp_path, "--lr", 1), None, images, 224, memory * GB)[0].batch_size
        (line,) = capsys.readouterr().out.splitlines()
        assert f"--batch-size {chosen} " in line and reason in line
    assert with_checkpoint(flags(tmp_path), None, 1281167)[0].batch_size == 256 and capsys.readouterr().out == ""


def test_the_digits_keep_their_own_default() -> None:
    for words in ([], ["--accum-steps", "4"]):
        assert with_checkpoint(flags(*words, nodes=2), None, 1438, 32, 2 * GB)[0].batch_size == 64


def test_bf16_and_an_evaluation_need_less_memory(tmp_path: Any) -> None:
    (tmp_path / "m.pth").write_text("")
    args = flags(tmp_path, "-e", "--resume", tmp_path / "m.pth")
    found = [
        default_batch_size(one, 0, 224, 8 * GB) for one in (flags(tmp_path), flags(tmp_path, precision="bf16"), args)
    ]
    assert found == [16, 32, 64]


@pytest.mark.parametrize("saved", [4, 16, 512])
def test_a_run_that_continues_keeps_the_batch_size_of_its_checkpoint(tmp_path: Any, saved: int) -> None:
    batch = {"batch_size": saved, "accum_steps": 1, "images_per_step": saved}
    checkpoint = Checkpoint("x", vgg.VGG("vgg11", 3, [8] * 5, 8).state_dict(), info=RunInfo(batch=batch))
    for words in ([], [tmp_path], ["--dummy", 300]):
        assert with_checkpoint(flags(*words), checkpoint, 300, 224, 2 * GB)[0].batch_size == saved
        assert with_checkpoint(flags(*words, "-b", 3), checkpoint, 300, 224, 2 * GB)[0].batch_size == 3
    with pytest.raises(UsageError, match="--batch-size"):
        with_checkpoint(flags(tmp_path, processes=3), checkpoint, 300, 224, 2 * GB)


@pytest.mark.parametrize(
    "count, per_step, expected, warns",
    [
        (500, 256, "1 step per epoch, 244 images left over", True),
        (500, 16, "31 steps per epoch, 4 images left over", False),
        (100, 10, "10 steps per epoch, 0 images left over", False),
        (110, 99, "1 step per epoch, 11 images left over", False),
        (111, 99, "1 step per epoch, 12 images left over", True),
        (1281167, 256, "5,004 steps per epoch, 143 images left over", False),
    ],
)
def test_steps_and_images_left_over_are_said(
    capsys: Any, count: int, per_step: int, expected: str, warns: bool
) -> None:
    run_info.log_data("x", 32, count, per_step, None, None)
    found = capsys.readouterr()
    assert expected in found.out and (f"{count % per_step:,}" in found.err) == ("warning" in found.err) == warns


@pytest.mark.parametrize("words", [["-b", 256], ["--lr", 0.01], ["--epochs", 90], ["--label-smoothing", 0]])
def test_nodes_that_differ_in_giving_a_flag_are_told(tmp_path: Any, words: list[Any]) -> None:
    given, left = (shared_flags(flags(tmp_path, *words)) for words in (words, []))
    different = [name for name in given if given[name] != left[name]]
    assert different == ["the flags that are left to their defaults"]
