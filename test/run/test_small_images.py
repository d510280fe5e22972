# SPDX-License-Identifier: BSD-3-Clause
"""Few and small images: the linear head, the defaults for them, and the schedules by step."""

from __future__ import annotations

import math

from engine.checkpoints import load_model
from engine.checkpoints.file import load

from helpers.images import write_cifar
from helpers.program import TWO, assert_same_weights, events, run_main, run_script, weights

import pytest
import torch

BN = ["--arch", "vgg11_bn", "--image-size", 32]


@pytest.fixture(scope="module")
def linear(folder, tmp_path_factory):
    """A checkpoint with the linear head, within its second epoch."""
    output = tmp_path_factory.mktemp("linear")
    flags = ["--head", "linear", "-b", 8, "--epochs", 2, "--lr", 0.01, "--ema-decay", 0.9]
    result = run_main(folder, *BN, *flags, "--stop-step-num", 4, "--output-dir", output)
    assert result.code == 0, result.err
    return output


def test_the_head_of_a_checkpoint_is_found_everywhere(linear, folder, tmp_path):
    path = linear / "checkpoint.pth.tar"
    last = {name: tensor.shape for name, tensor in weights(path).items() if name.startswith("classifier")}
    assert last == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    evaluated = run_main(folder, "-e", "--resume", path, "--output-dir", tmp_path)
    assert evaluated.code == 0, evaluated.err
    image = next((tmp_path.__class__(folder) / "val").glob("*/*"))
    predicted = run_script(
        "predict.py", image, "--checkpoint", path, "--device", "cpu", "--heatmap", tmp_path / "h.png"
    )
    assert predicted.code == 0 and (tmp_path / "h.png").exists(), predicted.err
    network = load_model(str(path)).network
    assert network.head == "linear" and network(torch.zeros(2, 3, 96, 64)).shape == (2, 3)
    continued = run_main(
        folder, "--auto-resume", "-b", 8, "--epochs", 2, "--lr", 0.01, "--ema-decay", 0.9, "--output-dir", linear
    )
    assert continued.code == 0, continued.err
    assert load(str(path))["epoch"] == 2


@pytest.mark.parametrize("flag", ["-e", "--auto-resume"])
def test_a_head_that_the_checkpoint_does_not_have_is_one_line(linear, folder, tmp_path, flag):
    given = ["-e", "--resume", linear / "checkpoint.pth.tar"] if flag == "-e" else ["--auto-resume"]
    output = tmp_path if flag == "-e" else linear
    before = (linear / "checkpoint.pth.tar").read_bytes()
    result = run_main(folder, *BN, "-b", 8, "--lr", 0.01, "--head", "paper", *given, "--output-dir", output)
    assert result.code == 2 and "use --head linear" in result.err and len(result.err.splitlines()) == 1
    assert (linear / "checkpoint.pth.tar").read_bytes() == before


@pytest.mark.parametrize("head", ["paper", "linear", None])
def test_pretrained_weights_start_either_head(linear, folder, tmp_path, head):
    given = [] if head is None else ["--head", head]
    pretrained = ["--pretrained", linear / "checkpoint.pth.tar", "--lr", 1e-12, "--freeze-features"]
    result = run_main(folder, "--image-size", 32, "-b", 8, "--epochs", 1, *given, *pretrained, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    before, after = load(str(linear / "checkpoint.pth.tar"))["state_dict_ema"], weights(tmp_path / "checkpoint.pth.tar")
    assert ("re-initialized" in result.out) == (head == "paper")
    assert ("classifier.6.weight" in after) == (head == "paper")
    kernel = "features.0.weight"
    assert torch.equal(before[kernel], after[kernel])


@pytest.mark.once
@pytest.mark.parametrize("arch, size", [("vgg13_bn", 33), ("vgg19", 75), ("vgg11_bn", 224)])
def test_the_linear_head_trains_and_exports_at_any_size(tmp_path, arch, size):
    """CIFAR-100, which is enlarged."""
    pytest.importorskip("onnxruntime")
    write_cifar(tmp_path / "数 据" / "cifar-100-binary", binary=True, count=16, classes=100)
    flags = ["--arch", arch, "--image-size", size, "--head", "linear", "-b", 8, "--epochs", 1, "--lr", 0.01]
    result = run_main(tmp_path / "数 据", *flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    checkpoint = ["--checkpoint", tmp_path / "checkpoint.pth.tar"]
    exported = run_script("export.py", *checkpoint, "--output", tmp_path / "x.onnx")
    assert exported.code == 0 and (tmp_path / "x.onnx").exists(), exported.err


# --- schedules --------------------------------------------------------------------------------------------------------


def expected_rate(schedule, position, epochs, warm_up, size):
    """From the definitions in docs/reference.md. position: epochs done, with a fraction."""
    if position < warm_up:
        return 0.1 * (position + 1) / (warm_up + 1)
    if schedule == "step":
        return 0.1 * 0.1 ** int(position / size)
    progress = (position - warm_up) / (epochs - warm_up)
    return 0.1 * (1 - progress if schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2)


@pytest.mark.parametrize("schedule, processes", [("cosine", []), ("step", []), ("onecycle", []), ("onecycle", TWO)])
def test_a_schedule_by_step_is_exact_and_resumes_within_an_epoch(folder, tmp_path, schedule, processes):
    flags = [folder, *BN, "-b", 4, "--epochs", 3, "--lr", 0.1, "--lr-schedule", schedule, "--lr-step-size", 2, "-p", 1]
    flags += processes
    whole = run_main(*flags, "--output-dir", tmp_path / "whole")
    assert whole.code == 0, whole.err
    for _ in range(2):
        stop = 5 if not (tmp_path / "parts").exists() else 100
        result = run_main(*flags, "--auto-resume", "--stop-step-num", stop, "--output-dir", tmp_path / "parts")
        assert result.code == 0, result.err
    assert_same_weights(*(weights(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "parts")))
    for name in ("whole", "parts"):
        lines = events(tmp_path / name, "train")
        steps = max(line["step"] for line in lines) // 3
        for line in lines:
            position = (line["step"] - 1) / steps
            wanted = expected_rate(schedule, position, 3, 1 if schedule == "onecycle" else 0, 2)
            assert line["lr"] == pytest.approx(wanted), line


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_few_images_gets_defaults_that_learn_and_a_resume_keeps_them(folder, tmp_path):
    flags = [folder, "--image-size", 32, "--output-dir", tmp_path]
    result = run_main(*flags, "--epochs", 2, "--stop-step-num", 1)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if "few images" in line]
    for word in ("--arch vgg16_bn", "--head linear", "--lr-schedule onecycle", "--label-smoothing 0.1"):
        assert word in line
    assert "--epochs" not in line  # it was given
    saved = load(str(tmp_path / "checkpoint.pth.tar"))
    rate = events(tmp_path, "train")[0]["lr"]
    assert saved["arch"] == "vgg16_bn" and saved["small_defaults"] is True
    result = run_main(*flags, "--epochs", 2, "--auto-resume")
    assert result.code == 0 and "few images" not in result.out, result.err
    assert events(tmp_path, "train")[-1]["lr"] < rate * 2 and load(str(tmp_path / "checkpoint.pth.tar"))["epoch"] == 2


@pytest.mark.parametrize(
    "given, small",
    [
        (["--arch", "vgg11"], False),
        (["--arch", "vgg11_bn"], True),
        (["--lr", 0.01], False),
        (["--wd", 0], True),
        (["-b", 4], True),
        (["--head", "paper"], True),
    ],
)
def test_each_flag_that_is_given_counts(tmp_path, given, small):
    """On CIFAR-10: a learning rate or a plain VGG keeps ImageNet's defaults, for which older commands were made."""
    write_cifar(tmp_path / "data", binary=True, count=8)
    result = run_main(tmp_path / "data", *given, "--stop-step-num", 1, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert ("few images" in result.out) == small and load(str(tmp_path / "checkpoint.pth.tar"))[
        "small_defaults"
    ] == small
    flag = str(given[0]) if given[0] != "-b" else "--batch-size"
    assert not small or f"{flag} " not in result.out.partition("few images")[2].splitlines()[0]


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [[], TWO])
def test_a_run_that_does_not_learn_says_so_once(tmp_path, processes):
    """A learning rate that is far too low: after 200 steps and two epochs, and not again."""
    write_cifar(tmp_path / "data", binary=True, count=40)
    flags = ["--arch", "vgg11", "-b", 2, "--lr", 1e-9, "--epochs", 4, "-p", 100, "--output-dir", tmp_path, *processes]
    result = run_main(tmp_path / "data", *flags)
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if "does not learn" in line]
    assert "--pretrained imagenet" in line and "--lr" in line
