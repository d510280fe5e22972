# SPDX-License-Identifier: BSD-3-Clause
"""The parser of all scripts: one-line errors, guesses, flags from files, and the types of flags."""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shlex
import sys
from typing import Any

from engine.errors import UsageError
from engine.options.flags import parse_args
from engine.parser import check_file, check_folder, device_list, loss_scale, nonempty_path, number

import export
import predict

import pytest


def refusal(capsys: Any, words: list[str], parse: Any = parse_args) -> str:
    """The line that refuses a command line."""
    with pytest.raises(SystemExit) as leaving:
        parse(words)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and len(err.splitlines()) == 1, err
    return err


# --- flags from files -------------------------------------------------------------------------------------------------


def test_flags_come_from_a_file_and_later_ones_win(tmp_path: Any) -> None:
    recipe = tmp_path / "my recipe.txt"
    recipe.write_text(  # with Windows' mark of UTF-8
        "\ufeff# a recipe\n--lr 0.2 --epochs 30\n--output-dir 'a folder#1'  # quoted\n-b 8\n\n", encoding="utf-8"
    )
    args = parse_args([f"@{recipe}", "--epochs", "40", "-a", "vgg11"])
    assert (args.lr, args.epochs, args.output_dir, args.batch_size, args.arch) == (0.2, 40, "a folder#1", 8, "vgg11")


@pytest.mark.parametrize("name", ["run #3", "#3", "a # b # c", "it's #3", 'the "best" #1', "back\\slash #2", "run#3"])
@pytest.mark.parametrize("comment", ["", '  # it\'s the "best" one', " ## 'a"])
def test_a_comment_begins_outside_of_quotes(tmp_path: Any, name: str, comment: str) -> None:
    double = '"' + name.replace("\\", r"\\").replace('"', r"\"") + '"'
    for quoted in (shlex.quote(name), double, re.sub(r"(\W)", r"\\\1", name)):
        (tmp_path / "recipe.txt").write_text(f"--output-dir {quoted}{comment}\n-b 8\n", encoding="utf-8")
        args = parse_args([f"@{tmp_path / 'recipe.txt'}"])
        assert (args.output_dir, args.batch_size) == (name, 8), quoted


def test_an_unbalanced_quote_in_a_file_is_one_line(tmp_path: Any, capsys: Any) -> None:
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("--output-dir 'a folder\n", encoding="utf-8")
    assert "'a folder: No closing quotation" in refusal(capsys, [f"@{recipe}"])


def test_a_file_that_names_itself_is_one_line(tmp_path: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.txt").write_bytes(b"@loop.txt")
    assert "names itself" in refusal(capsys, ["@loop.txt"])


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="argparse of Python 3.12 reads any bytes")
def test_a_file_in_another_encoding_is_one_line(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "gbk.txt").write_bytes("--data 中文".encode("gbk"))
    assert "save it as UTF-8" in refusal(capsys, [f"@{tmp_path / 'gbk.txt'}"])


def test_a_file_in_the_home_folder_is_found(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.txt").write_text("--epochs 3 --output-dir ~/out")
    args = parse_args(["@~/recipe.txt"])
    assert (args.epochs, args.output_dir) == (3, str(tmp_path / "out"))


# --- errors and guesses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["@/no/such/file"], "error: @/no/such/file: No such file or directory;"),
        (["@no's"], "error: @no's: No such file or directory;"),
        (['@a "file"'], 'error: @a "file": No such file or directory;'),
        (["@it's: 'a'"], "error: @it's: 'a': No such file or directory;"),
        (["@/"], "error: @/: Is a directory;"),
        (["--batch_size", "8"], "unrecognized arguments: --batch_size (did you mean --batch-size?);"),
        (["--num-workers=8"], "unrecognized arguments: --num-workers=8 (did you mean --workers?);"),
        (["--foo", "1"], "unrecognized arguments: --foo;"),
        (["--color-shift=1"], "--color-shift takes no value, got '1'"),
        (["--epochs"], "error: --epochs: expected one argument"),
        (["--epochs", "0"], "error: --epochs must be at least 1, got 0"),
        (["--epochs", "x"], "error: --epochs: expected an integer, got 'x'"),
        (["--auto-augment", "best"], "--auto-augment: invalid choice: 'best'"),
    ],
)
def test_an_error_names_flag_expectation_and_value(words: list[str], message: str, capsys: Any) -> None:
    assert message in refusal(capsys, words)


@pytest.mark.parametrize("flag", ["--resume", "--pretrained", "--weights", "--model", "--ckpt", "--checkpoints"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_model_is_asked_for_under_the_name_that_a_script_has(flag: str, joined: bool, capsys: Any) -> None:
    words = [f"{flag}=m.pth"] if joined else [flag, "m.pth"]
    for parse, more in ((predict.parse_args, ["x.jpg"]), (export.parse_args, [])):
        assert "did you mean --checkpoint?" in refusal(capsys, [*more, *words], parse)


def test_main_py_continues_from_what_the_others_call_checkpoint(capsys: Any) -> None:
    assert "did you mean --resume?" in refusal(capsys, ["-e", "--checkpoint", "m.pth"])


def test_the_model_of_timm_is_the_architecture_of_main_py(capsys: Any) -> None:
    assert "did you mean --arch?" in refusal(capsys, ["--model", "vgg16"])


def test_words_after_two_dashes_are_no_flags() -> None:
    assert predict.parse_args(["--checkpoint", "m", "--", "--odd.jpg"]).images == ["--odd.jpg"]


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "gpu:0", "gpu:12", "npu:3", "mps:0", "cpu:0"])
def test_a_device_with_a_number_becomes_two_flags(device: str, capsys: Any) -> None:
    name, _, number = device.replace("cuda", "gpu").partition(":")
    for parse, more in ((parse_args, []), (predict.parse_args, ["x.jpg", "--checkpoint", "m"])):
        for words in (["--device", device], [f"--device={device}"]):
            err = refusal(capsys, [*more, *words], parse)
            assert f"'{device}'" in err and f"did you mean --device {name} --gpu {number}?" in err, err
    accepted = parse_args(["--device", name, "--gpu", number])
    assert (accepted.device, accepted.gpu) == (name, int(number))


@pytest.mark.parametrize("device", ["cuda:", "tpu:0", "cuda:x", "rocm"])
def test_another_device_is_refused_without_a_guess(device: str, capsys: Any) -> None:
    err = refusal(capsys, ["--device", device])
    assert f"--device: invalid choice: '{device}'" in err and "did you mean" not in err


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, bounds, text, message",
    [
        (int, {"at_least": 1}, "0", "must be at least 1, got 0"),
        (int, {"at_least": 1, "at_most": 4}, "5", "must be at least 1 and at most 4, got 5"),
        (float, {"above": 0, "at_most": 1}, "0", "must be above 0 and at most 1, got 0"),
        (float, {"at_least": 0, "below": 1}, "1", "must be at least 0 and below 1, got 1"),
        (float, {}, "nan", "must be finite, got nan"),
        (float, {"at_least": 0}, "inf", "must be finite, got inf"),
        (int, {}, "1.5", "expected an integer, got '1.5'"),
        (float, {}, "", "expected a number, got ''"),
    ],
)
def test_a_number_outside_its_bounds_is_refused(kind: type, bounds: Any, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        number(kind, **bounds)(text)
    assert str(error.value) == message


def test_a_number_on_its_bounds_is_accepted() -> None:
    assert number(int, 0, 2**32 - 1)("4294967295") == 2**32 - 1 and number(int, -1)("-1") == -1
    assert number(float, 0, 1)("1") == 1.0 and number(float, above=0)("1e-9") == 1e-9
    assert number(int)(str(10**400)) == 10**400


def test_a_tilde_in_quotes_is_the_home_folder(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nonempty_path("~/photos") == str(tmp_path / "photos") and nonempty_path("~") == str(tmp_path)
    user = pwd.getpwuid(os.getuid())
    assert nonempty_path(f"~{user.pw_name}/x") == os.path.join(user.pw_dir, "x")
    for path in ("~no_such_user/x", "~backup.pth", "a/~/b", "./~", "photos~"):
        assert nonempty_path(path) == path


def test_device_lists_and_loss_scales() -> None:
    assert device_list("0,1,5") == [0, 1, 5]
    assert loss_scale("dynamic") == "dynamic" and loss_scale("8") == 8.0
    for parse, text in ((device_list, "0;1"), (device_list, "0,-1"), (loss_scale, "0"), (loss_scale, "static")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"got '?{text}"):
            parse(text)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    check_folder("--output-dir", str(tmp_path / "new" / "folder"))
    check_file("--predictions", str(tmp_path / "other" / "x.csv"))
    assert (tmp_path / "new" / "folder").is_dir() and os.listdir(str(tmp_path / "other")) == []
    with pytest.raises(UsageError, match=f"--output-dir {tmp_path}/file/x: cannot write there"):
        check_folder("--output-dir", str(tmp_path / "file" / "x"))
    with pytest.raises(UsageError, match=f"--predictions {tmp_path}: expected a file, this is a folder"):
        check_file("--predictions", str(tmp_path))
