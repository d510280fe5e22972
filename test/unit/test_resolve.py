# SPDX-License-Identifier: BSD-3-Clause
"""What the flags mean on this machine and for the data: learning rates, sizes, and what is refused before a start."""

from __future__ import annotations

import math

from engine.checkpoints import Checkpoint, RunInfo
from engine.data import Preprocessing, open_datasets
from engine.data.datasets import read_digits
from engine.errors import UsageError, UserError
from engine.options.flags import parse_args
from engine.options.resolve import resolve_augmentation, resolve_preprocessing, resolve_views, with_checkpoint
from engine.versions import TORCH

import main
import vgg
from helpers.program import TWO

import pytest
import torch


def test_learning_rate_warms_up_linearly_and_follows_a_cosine():
    args = parse_args(["--epochs", "10", "--lr", "0.08", "--min-lr", "0.01", "--warmup-epochs", "3"])
    rates = [main.learning_rate(epoch, 0.5, args) for epoch in range(10)]
    assert rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert rates == rates[:3] + sorted(rates[3:], reverse=True)
    assert rates[9] == pytest.approx(0.01 + 0.07 * 0.5 * (1 + math.cos(math.pi * 6 / 7)))


def test_a_resize_that_cannot_keep_the_images_per_step_scales_the_learning_rate(tmp_path, capsys):
    args = parse_args([str(tmp_path), "--arch", "vgg11", "--epochs", "2", "--lr", "0.01", "-b", "4"])
    args.nodes = 3
    _, saved = with_checkpoint(args, None)
    assert saved == {"batch_size": 4, "accum_steps": 1, "images_per_step": 12} and capsys.readouterr().out == ""
    args.nodes = 2
    checkpoint = Checkpoint("x", vgg.VGG("vgg11", 3, [8] * 5, 8).state_dict(), info=RunInfo(batch=saved))
    resized, batch = with_checkpoint(args, checkpoint)
    assert batch == saved
    assert "8 images per step in place of 12, so learning rates are multiplied by 0.6667" in capsys.readouterr().out
    assert resized.lr == pytest.approx(0.01 * 2 / 3) and resized.accum_steps == 1 and args.lr == 0.01
    args.batch_size = 5  # a flag that was changed counts as it is
    assert with_checkpoint(args, checkpoint)[0].lr == 0.01 and capsys.readouterr().out == ""


# What is trained on, its images, and the --epochs and --lr that it gets.
@pytest.mark.parametrize(
    "data, images, epochs, lr",
    [(".", 10**6, 90, 0.01), (".", 8000, 30, 0.1 * 64 / 128), (".", 64000, 30, 0.1), (None, 1438, 16, 0.05)],
    ids=["ImageNet", "few images", "more images", "digits"],
)
@pytest.mark.parametrize("given", [[], ["--epochs", "20"], ["--lr", "0.03"], ["--epochs", "50", "--lr", "0.3"]])
def test_a_schedule_must_fit_the_defaults_of_what_is_trained_on(data, images, epochs, lr, given):
    flags = dict(zip(given[::2], given[1::2]))
    if data and "--lr" in flags:
        epochs = 90  # ImageNet's defaults then
    epochs, lr = int(flags.get("--epochs", epochs)), float(flags.get("--lr", lr))

    def refusal(*words):
        """The line that refuses the flags, before the images are known or after."""
        try:
            args = parse_args([*[data] * bool(data), *given, *words])
            args.nodes, args.processes, args.precision = 1, 1, "fp32"
            with_checkpoint(args, None, images, 32)
        except SystemExit as exited:
            return str(exited.code)
        except UsageError as error:
            return str(error)
        return None

    for flag in ("--start-epoch", "--warmup-epochs"):
        found = [refusal(flag, str(value)) for value in (1, epochs - 1, epochs, 89, 90, 91)]
        assert found[:2] == [None, None] and all(found[2:3] + found[4:]), found
        assert found[2] in ("2", f"{flag} must be less than --epochs {epochs}, got {epochs}")
        assert (found[3] is None) == (epochs > 89)
    found = [refusal("--min-lr", str(value)) for value in (0, lr, 1.01 * lr)]
    assert found[:2] == [None, None]
    assert found[2] in ("2", f"--min-lr must be at most --lr {lr}, got {1.01 * lr}")


def test_an_evaluation_normalizes_as_the_training_did():
    dataset = read_digits(training=False)
    args = parse_args(["-e", "--pretrained", "imagenet", "--image-size", "48"])
    saved = {"image_size": 48, "crop": True, "mean": [0.1] * 3, "std": [0.2] * 3}
    checkpoint = Checkpoint("x", {}, info=RunInfo(preprocessing=saved))
    assert resolve_preprocessing(args, dataset, checkpoint).to_dict() == {**saved, "crop": False}
    args = parse_args([])  # a training has its own
    assert resolve_preprocessing(args, dataset, None) == dataset.preprocessing


WRONG = [
    (["--no-such-flag"], "no-such-flag"),
    (["--epoch", "3"], "--epoch"),
    (["-b", "0"], "must be at least 1, got 0"),
    (["-b", "many"], "expected an integer, got 'many'"),
    (["--lr", "nan"], "--lr/--learning-rate must be finite, got nan"),
    (["--lr", "inf"], "--lr/--learning-rate must be finite, got inf"),
    (["/no/such/folder"], "/no/such/folder"),
    (["--resume", "/no/such/file"], "/no/such/file"),
    (["-e"], "--resume PATH"),
    (["--device", "npu"], "NPU"),
    (["--device", "gpu"], "GPU"),
    (["-b", "7", *TWO], "use 6 or 8"),
    (["--arch", "resnet50"], "resnet50"),
    (["--rank", "5", "--world-size", "2"], "--rank 5"),
    (["--world-size", "0"], "--world-size must be at least 1, got 0"),
    (["--warmup-epochs", "16"], "--warmup-epochs must be less than --epochs 16, got 16"),
    (["--amp", "--amp-dtype", "fp16"], "bf16" if hasattr(torch, "autocast") else "1.10"),
    (["--device-list", "0,-1"], "device numbers from 0 up"),
    (["--dist-url", "nonsense"], "tcp://"),
    (["-j", "-1"], "must be at least 0, got -1"),
    (["--report", "x"], "--report requires --evaluate"),
    (["--grad-compress", "int8"], "int8"),
    (["--rendezvous-timeout", "-5"], "--rendezvous-timeout must be at least 1, got -5"),
    (["--train-scale", "16", "64"], "--train-scale must be at least 32 and at most 4096, got 16"),
]
for url in ("file:///tmp/x", "tcp://10.0.0.1:99999", "tcp://10.0.0.1:0", "10.0.0.1:59629"):
    WRONG.append((["--world-size", "2", "--rank", "1", "--dist-url", url], "--dist-url: expected"))
if TORCH < (2, 0):
    WRONG.append((["--compile"], "--compile requires torch 2.0"))
    WRONG.append((["--grad-compress", "bf16"], "--grad-compress requires torch 2.0"))
if not hasattr(torch, "profiler"):
    WRONG.append((["--profile"], "--profile requires torch 1.8.1"))


@pytest.mark.parametrize("flags, word", WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, capsys, flags, word):
    if flags == ["--device", "gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    device = [] if "--device" in flags else ["--device", "cpu"]
    try:
        main.main([*device, *flags, "--output-dir", str(tmp_path)])
    except SystemExit as exited:
        code, text = exited.code, capsys.readouterr().err
    except UserError as error:
        code, text = error.exit_code, f"{error}\n"
    assert code == 2 and len(text.splitlines()) == 1 and word in text, text


def test_sizes_that_do_not_fit_each_other_are_refused(folder: str) -> None:
    """A scale that is smaller than the crop, in training and in an evaluation."""
    dataset = open_datasets(folder, evaluate=True, skip_unreadable=False)[1]
    args = parse_args([folder, "--train-scale", "48", "64"])
    with pytest.raises(UsageError, match="at least the crop, --image-size 64, got 48"):
        resolve_augmentation(args, dataset, 64)
    with pytest.raises(UsageError, match="--train-scale are for folders of images: leave them out"):
        resolve_augmentation(args, read_digits(training=False), 32)
    args = parse_args([folder, "-e", "--pretrained", "imagenet", "--eval-view", "dense", "--eval-scales", "96", "48"])
    with pytest.raises(UsageError, match="--eval-scales must be at least the crop, --image-size 64, got 48"):
        resolve_views(args, Preprocessing(64), dataset)
