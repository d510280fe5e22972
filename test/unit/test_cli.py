# SPDX-License-Identifier: BSD-3-Clause
"""The parser: flags from files, and flags that exclude each other."""

from __future__ import annotations

import sys
from typing import Any

from engine.options.flags import parse_args

import pytest


def test_flags_come_from_a_file_and_later_ones_win(tmp_path: Any) -> None:
    recipe = tmp_path / "my recipe.txt"
    recipe.write_text(  # with Windows' mark of UTF-8
        "\ufeff# a recipe\n--lr 0.2 --epochs 30\n--output-dir 'a folder#1'  # quoted\n-b 8\n\n", encoding="utf-8"
    )
    args = parse_args([f"@{recipe}", "--epochs", "40", "-a", "vgg11"])
    assert (args.lr, args.epochs, args.output_dir, args.batch_size, args.arch) == (0.2, 40, "a folder#1", 8, "vgg11")


def test_an_unbalanced_quote_in_a_file_is_one_line(tmp_path: Any, capsys: Any) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("--output-dir 'a folder\n", encoding="utf-8")
    with pytest.raises(SystemExit) as leaving:
        parse_args([f"@{recipe}"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "'a folder: No closing quotation" in err and len(err.splitlines()) == 1


def test_a_file_that_names_itself_is_one_line(tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.txt").write_bytes(b"@loop.txt")
    with pytest.raises(SystemExit) as leaving:
        parse_args(["@loop.txt"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "names itself" in err and len(err.splitlines()) == 1, err


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="argparse of Python 3.12 reads any bytes")
def test_a_file_in_another_encoding_is_one_line(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "gbk.txt").write_bytes("--data 中文".encode("gbk"))
    with pytest.raises(SystemExit) as leaving:
        parse_args([f"@{tmp_path / 'gbk.txt'}"])
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and "save it as UTF-8" in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    "words, message",
    [
        (["@/no/such/file"], "error: @/no/such/file: No such file or directory;"),
        (["--batch_size", "8"], "unrecognized arguments: --batch_size (did you mean --batch-size?);"),
        (["--num-workers=8"], "unrecognized arguments: --num-workers=8 (did you mean --workers?);"),
        (["--foo", "1"], "unrecognized arguments: --foo;"),
        (["--resume", ""], "--resume: expected a path, got an empty string"),
        (["--color-shift=1"], "--color-shift takes no value, got '1'"),
        (["--image-size", "99999"], "--image-size must be at least 32 and at most 4096, got 99999"),
        (["--ema-decay", "1"], "--ema-decay must be at least 0 and below 1, got 1"),
        (["--lr", "0.1", "--min-lr", "0.2"], "--min-lr must be at most --lr 0.1, got 0.2"),
        (["--eval-view", "dense"], "--eval-view requires --evaluate"),
        (["--predictions", "x.csv"], "--predictions requires --evaluate"),
        (["--eval-scales", "256"], "--eval-scales requires --evaluate"),
        (["--crop-scale", "0.5", "0.2"], "--crop-scale: MIN must be at most MAX, got 0.5 0.2"),
        (["--crop-scale", "0", "1"], "--crop-scale must be above 0 and at most 1, got 0"),
        (
            ["--crop-scale", "0.1", "1", "--train-scale", "256", "512"],
            "--crop-scale cannot be combined with --train-scale",
        ),
        (["--resume", "/"], "--resume /: expected a file, this is a folder"),
        ([sys.executable], "expected a folder"),
        (["--val-split", "0.1"], "--val-split requires --data DIR"),
        (["-e", "--auto-resume", "--pretrained", "imagenet"], "name the checkpoint with --resume"),
        (["--val-split", "1"], "--val-split must be above 0 and below 1, got 1"),
        (["--dummy", "8", "--val-split", "0.1"], "--dummy cannot be combined with --data, --val-split or --evaluate"),
        (["--mixup", "-1"], "--mixup must be at least 0, got -1"),
        (["--auto-augment", "best"], "--auto-augment: invalid choice: 'best'"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_args(words)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and message in err and len(err.splitlines()) == 1, err
