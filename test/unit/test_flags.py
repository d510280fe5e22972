# SPDX-License-Identifier: BSD-3-Clause
"""The flags of main.py: defaults, flags that exclude each other, and the table of augmentation."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from engine.checkpoints import Checkpoint, RunInfo
from engine.data import Preprocessing
from engine.data.datasets import read_digits
from engine.errors import UsageError
from engine.options.flags import (
    AUGMENTATION,
    AUGMENTATION_FLAGS,
    DEFAULTS,
    DIGITS,
    build_parser,
    complete_defaults,
    parse_args,
)
from engine.options.resolve import describe_run, resolve_preprocessing

from helpers.program import REPOSITORY

import pytest

# --- defaults ---------------------------------------------------------------------------------------------------------


def test_what_is_trained_on_chooses_the_defaults(tmp_path: Any) -> None:
    for words, defaults in (([], DIGITS), ([str(tmp_path)], DEFAULTS), (["--dummy"], DEFAULTS)):
        args = vars(parse_args(words))
        assert {name: args[name] for name in defaults} == defaults
    for name, value in DEFAULTS.items():  # --help shows ImageNet's
        assert build_parser().get_default(name) == value


CHOICES = {"arch": ["vgg11", "vgg19_bn"], "head": ["linear", "paper"], "lr_schedule": ["step", "cosine"]}
CHOICES["label_smoothing"] = [0.5, 1]
CHOICES["ema_decay"] = [0.5, 0.9]


@pytest.mark.parametrize("name, value", [(name, value) for name in DEFAULTS for value in CHOICES.get(name, [3, 7])])
def test_a_flag_that_is_given_counts(name: str, value: Any) -> None:
    given = vars(parse_args(["--epochs", "9", f"--{name.replace('_', '-')}", str(value)]))
    assert given[name] == value and all(
        given[other] == DIGITS[other] for other in DIGITS if other not in (name, "epochs")
    )


@pytest.mark.parametrize("word", ["-b256", "-b=256", "--batch-size=256"])
def test_a_flag_that_is_given_as_imagenets_default_counts_too(word: str) -> None:
    assert parse_args([word]).batch_size == 256


def test_a_further_set_of_defaults_is_a_dict() -> None:
    args = build_parser().parse_args(["--lr", "0.3"])
    complete_defaults(args, {"epochs": 2, "warmup_epochs": 5, "lr": 0.1}, ["epochs", "batch_size", "warmup_epochs"])
    assert (args.epochs, args.warmup_epochs, args.lr, args.batch_size) == (2, 1, 0.3, DEFAULTS["batch_size"])


def test_the_default_warm_up_is_shorter_than_the_run() -> None:
    assert [parse_args(["--epochs", str(epochs)]).warmup_epochs for epochs in (1, 2, 3, 30)] == [0, 1, 2, 2]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="the system has no /dev/fd")
def test_flags_are_read_once() -> None:
    """`@<(command)` of a shell can be read only once."""
    reader, writer = os.pipe()
    os.write(writer, b"--epochs 5")
    os.close(writer)
    assert parse_args([f"@/dev/fd/{reader}"]).epochs == 5
    os.close(reader)


# --- augmentation -----------------------------------------------------------------------------------------------------


def augmentation_actions() -> list[Any]:
    return next(group for group in build_parser()._action_groups if group.title == "augmentation")._group_actions


def identity(args: Any) -> dict[str, Any]:
    """What must be the same to continue within an epoch."""
    args.nodes = args.processes = 1
    return describe_run(args, {}, Preprocessing(), None, None).identity


def test_the_identity_of_a_run_has_every_augmentation_flag() -> None:
    """A run that continues with other augmentation would train on other images."""
    assert list(AUGMENTATION) == [
        "crop_scale",
        "train_scale",
        "hflip",
        "color_shift",
        "auto_augment",
        "random_erasing",
        "mixup",
        "cutmix",
    ]
    assert [action.dest for action in augmentation_actions()] == list(AUGMENTATION)
    for action in augmentation_actions():
        values = action.choices or (
            [] if action.nargs == 0 else ["40", "50"] if "train" in action.dest else ["0.2", "0.3"]
        )
        args = parse_args(["--image-size", "32", action.option_strings[0], *values[: action.nargs or 1]])
        entry = identity(args).get("augmentation", "")
        assert entry == f"{action.dest} {getattr(args, action.dest)}" and getattr(args, action.dest), action.dest


def test_without_augmentation_flags_the_identity_has_no_entry() -> None:
    args = parse_args(["--image-size", "32"])
    assert "augmentation" not in identity(args)
    assert {name: getattr(args, name) or None for name in AUGMENTATION} == {
        name: default or None for name, default in AUGMENTATION.items()
    }


@pytest.mark.parametrize("name, heading", [("docs/reference.md", "Augmentation"), ("docs/zh/reference.md", "数据增强")])
def test_the_reference_lists_augmentation_as_the_table_does(name: str, heading: str) -> None:
    with open(os.path.join(REPOSITORY, name), encoding="utf-8") as file:
        section = file.read().split(f"\n### {heading}\n")[1].split("\n#")[0]
    assert re.findall(r"^\| `(--[a-z-]+)", section, re.MULTILINE) == list(AUGMENTATION_FLAGS)


def test_class_weights_are_part_of_the_identity(tmp_path: Any) -> None:
    (tmp_path / "w.txt").write_text("1\n2\n")
    given = [["--class-weights", value] for value in ("auto", str(tmp_path / "w.txt"))]
    found = [identity(parse_args(["--image-size", "32", *words])).get("--class-weights") for words in ([], *given)]
    assert found[:2] == [None, "auto"] and found[2].startswith("a file (CRC ")


# --- paths and devices ------------------------------------------------------------------------------------------------


def test_every_path_flag_knows_the_home_folder(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.pth").write_text("")
    paths = ["--data ~", "--output-dir ~/out", "--pretrained ~/m.pth", "--resume=~/m.pth"]
    paths += ["--report ~/page", "--predictions ~/x.csv"]
    args = parse_args(["-e", *(word for path in paths for word in path.split())])
    for flag in ("data", "output_dir", "pretrained", "resume", "report", "predictions"):
        assert getattr(args, flag).startswith(str(tmp_path)), flag
    assert parse_args(["~"]).data == str(tmp_path)


# --- flags that exclude each other ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resume", ""], "--resume: expected a path, got an empty string"),
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
        (["--val-split", "0.1"], "--val-split requires --data: a folder of classes or a list of images"),
        (["-e", "--auto-resume", "--pretrained", "imagenet"], "name the checkpoint with --resume"),
        (["--val-split", "1"], "--val-split must be above 0 and below 1, got 1"),
        (["--dummy", "8", "--val-split", "0.1"], "--dummy cannot be combined with --data, --val-split or --evaluate"),
        (["--lr", "0"], "--lr/--learning-rate must be above 0, got 0"),
        (["--learning-rate=0.0"], "must be above 0, got 0.0"),
        (["--resume", "/no/such.pth"], "--resume /no/such.pth: no such file"),
        (["/no/such/folder"], "--data /no/such/folder: no such folder"),
        (["--data", "/", "/usr"], "DIR /usr and --data / are different folders"),
        (["--freeze-features"], "--freeze-features requires weights"),
        (["-e"], "--evaluate requires weights"),
        (["--resume", sys.executable, "--auto-resume"], "--resume cannot be combined with --auto-resume"),
        (["--world-size", "0"], "--world-size must be at least 1, got 0"),
        (["--epochs", "3", "--start-epoch", "3"], "--start-epoch must be less than --epochs 3, got 3"),
        (["--warmup-epochs", "16"], "--warmup-epochs must be less than --epochs 16, got 16"),
        (["--dummy", "8", "--class-weights", "auto"], "--class-weights requires training images: leave --dummy out"),
        (["--freeze-blocks", "2"], "--freeze-blocks or --freeze-features requires weights"),
        (["--freeze-blocks", "6"], "--freeze-blocks must be at least 0 and at most 5, got 6"),
        (["--freeze-features", "--features-lr", "0.1", "--resume", sys.executable], "--features-lr has no effect with"),
        (["--features-lr", "0"], "--features-lr must be above 0, got 0"),
        (["--dummy", "8", "--patience", "2"], "--patience requires validation images: leave --dummy out"),
        (["--best", "f1"], "--best: invalid choice: 'f1'"),
        (["--mixup", "-1"], "--mixup must be at least 0, got -1"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse_args(words)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and message in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("flag", ["--output-dir", "--report"])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    "data, folder, inside",
    [
        (".", ".", True),
        (".", "out", True),
        ("../flowers", "cat/out/1", True),
        (".", "link", True),
        (".", "..", False),
        ("cat", ".", False),
        (".", "../flowers2/out", False),
        (".", ".hidden/out", False),  # left out, as all hidden folders are
        ("list.csv", "out", False),
    ],
)
def test_what_a_run_writes_is_no_class_of_the_folder_that_it_splits(
    tmp_path: Any, monkeypatch: Any, capsys: Any, flag: str, split: bool, data: str, folder: str, inside: bool
) -> None:
    for name in ("cat", ".hidden", "../flowers2"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
    (tmp_path / "flowers" / "link").symlink_to("cat")
    (tmp_path / "flowers" / "list.csv").write_text("")
    monkeypatch.chdir(tmp_path / "flowers")
    words = [data, *["--val-split", "0.1"] * split, flag, folder]
    if flag == "--report":
        words += ["-e", "--pretrained", "imagenet", "--output-dir", ".."]
    if not (inside and split):
        parse_args(words)
        return
    with pytest.raises(SystemExit) as leaving:
        parse_args(words)
    err = capsys.readouterr().err
    assert leaving.value.code == 2 and len(err.splitlines()) == 1, err
    assert f"{flag} {folder} lies in --data {data}, whose folders are the classes: choose one outside" in err


# --- --exif-rotate ----------------------------------------------------------------------------------------------------


def test_exif_rotate_is_part_of_the_identity_and_an_evaluation_takes_it_from_the_checkpoint() -> None:
    plain, turned = (parse_args([*flags, "--image-size", "32"]) for flags in ([], ["--exif-rotate"]))
    assert [resolve_preprocessing(args, None, None).exif_rotate for args in (plain, turned)] == [False, True]
    for args in (plain, turned):
        args.nodes = args.processes = 1
        preprocessing = resolve_preprocessing(args, None, None)
        assert ("--exif-rotate" in describe_run(args, {}, preprocessing, None, None).identity) == args.exif_rotate
    saved = Checkpoint("x.pth", {}, info=RunInfo(preprocessing=Preprocessing(32, exif_rotate=True).to_dict()))
    assert not resolve_preprocessing(plain, None, saved).exif_rotate  # a training has the flag of its own
    plain.evaluate = True
    assert resolve_preprocessing(plain, None, saved).exif_rotate
    with pytest.raises(UsageError, match="--exif-rotate is for folders"):
        resolve_preprocessing(turned, read_digits(training=False), None)
