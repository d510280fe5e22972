# SPDX-License-Identifier: BSD-3-Clause
"""main.py through its command line: training, evaluating, resuming, and the shapes of what it prints and writes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys

from engine.checkpoints.file import load
from engine.data import Augmentation
from engine.options.flags import parse_args
from engine.parallel import free_port
from engine.versions import TORCH

import vgg
from helpers.images import make_folder, write_cifar
from helpers.program import MAIN, TWO, assert_same_weights, events, run, run_main, start_main, wait_for_line, weights
from helpers.trained import TorchvisionVGG

import pytest
import torch
import torchvision

SMALL = ["--arch", "vgg11", "--image-size", "32", "--lr", "0.01"]
SECONDS = r"[ \d.]{6} \([ \d.]{6}\)"
LOSS = r"Loss \d+\.\d{8} \(\d+\.\d{8}\)"
EPOCH_LINE = re.compile(
    rf"^Epoch: \[\d+\]\[ *\d+/\d+\]\tTime {SECONDS}\tData {SECONDS}\t{LOSS}\tAcc@1 {SECONDS}\tAcc@5 {SECONDS}$"
)
TEST_LINE = re.compile(rf"^Test: \[ *\d+/\d+\]\tTime {SECONDS}\t{LOSS}\tAcc@1 {SECONDS}\tAcc@5 {SECONDS}$")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Two epochs on the folder of JPEGs: (output folder, result)."""
    output = tmp_path_factory.mktemp("out put")
    flags = ["-b", 8, "--epochs", 2, "-p", 2, "--label-smoothing", 0.1, "--warmup-epochs", 1, "--clip-grad-norm", 1]
    result = run_main(folder, *SMALL, *flags, "--output-dir", output)
    assert result.code == 0, result.err
    return output, result


# --- what a run prints and writes -------------------------------------------------------------------------------------


def test_log_lines_have_the_shapes_that_others_parse(trained):
    lines = trained[1].out.splitlines()
    epoch_lines = [line for line in lines if line.startswith("Epoch")]
    test_lines = [line for line in lines if line.startswith("Test")]
    assert epoch_lines and all(EPOCH_LINE.match(line) for line in epoch_lines), epoch_lines
    assert test_lines and all(TEST_LINE.match(line) for line in test_lines), test_lines
    assert epoch_lines[-1].startswith("Epoch: [1][3/3]\t")
    throughput = r"^\[npu id: 0 \] \* FPS@all \d+\.\d{3}$"
    accuracy = r"^\[npu id: 0 \] \[AVG-ACC\] \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}$"
    for pattern in (throughput, accuracy):
        assert len([line for line in lines if re.match(pattern, line)]) == 2


def test_output_folder_holds_checkpoints_flags_and_metrics(trained):
    output = trained[0]
    expected = {"checkpoint.pth.tar", "checkpoint.pth.tar.previous", "model_best.pth.tar", "args.json", "metrics.jsonl"}
    assert expected <= set(os.listdir(str(output)))
    record = json.loads((output / "args.json").read_text())
    assert record["flags"]["arch"] == "vgg11" and record["torch"] == torch.__version__
    assert record["decoder"] == Augmentation.decoder and record["hardware"] and record["processes"] == 1
    kinds = [event["event"] for event in events(output)]
    assert kinds[0] == "start" and kinds[-1] == "done" and kinds.count("epoch") == kinds.count("validate") == 2
    validated = events(output, "validate")[-1]
    assert validated["samples"] == 15
    assert validated["acc1"] == pytest.approx(float(trained[1].accuracy()[0]), abs=5e-4)


def test_curves_are_drawn_if_matplotlib_is_installed(trained):
    pytest.importorskip("matplotlib")
    assert (trained[0] / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoint_has_the_references_keys_and_loads_into_torchvision(folder, tmp_path):
    result = run_main(folder, *SMALL, "-b", 8, "--epochs", 1, "--output-dir", tmp_path, program=MAIN)
    assert result.code == 0, result.err
    state = load(str(tmp_path / "checkpoint.pth.tar"))
    assert {"epoch", "state_dict", "best_acc1", "optimizer", "amp"} <= set(state) and state["epoch"] == 1
    network = torchvision.models.vgg11(num_classes=3)
    network.load_state_dict(state["state_dict"])
    torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).load_state_dict(state["optimizer"])


def test_embedded_digits_are_learned_with_the_defaults(tmp_path):
    """`python main.py` alone: the defaults for the digits are in effect, and each can be overridden."""
    result = run_main("--stop-step-num", 1, "--output-dir", tmp_path)
    assert result.code == 0 and "the embedded digits (no --data given)" in result.out, result.err
    flags = json.loads((tmp_path / "args.json").read_text())["flags"]
    expected = {"batch_size": 64, "epochs": 16, "lr": 0.05, "warmup_epochs": 2, "clip_grad_norm": 1.0, "eval_freq": 4}
    assert {name: flags[name] for name in expected} == expected
    changed = parse_args(["--epochs", "1", "--lr", "0.1", "-b", "8"])
    assert (changed.epochs, changed.lr, changed.batch_size, changed.warmup_epochs) == (1, 0.1, 8, 0)
    imagenet = parse_args([str(tmp_path)])
    assert (imagenet.epochs, imagenet.lr, imagenet.batch_size, imagenet.warmup_epochs) == (90, 0.01, 256, 0)


def test_dummy_measures_without_data(tmp_path):
    flags = ["--dummy", 100, "--arch", "vgg11", "--image-size", 32, "-b", 8, "--stop-step-num", 12]
    result = run_main(*flags, "--output-dir", tmp_path)
    assert result.code == 0 and "FPS@all" in result.out, result.err


def test_a_run_that_validates_nothing_names_no_best_model_of_another_run(tmp_path):
    (tmp_path / "model_best.pth.tar").write_bytes(b"of another run")
    flags = ["--dummy", 16, "--arch", "vgg11", "--head", "linear", "--image-size", 32, "-b", 8, "--epochs", 1]
    result = run_main(*flags, "--output-dir", tmp_path)
    assert result.code == 0 and "FPS@all" in result.out and "=> best" not in result.out, result.err


def test_help_lists_every_flag_of_the_reference():
    result = run(sys.executable, MAIN, "--help")
    assert result.code == 0
    for flag in [
        "--data",
        "-j",
        "--j",
        "--workers",
        "--epochs",
        "--start-epoch",
        "-b",
        "--batch-size",
        "--lr",
        "--learning-rate",
        "--momentum",
        "--wd",
        "--weight-decay",
        "-p",
        "--p",
        "--print-freq",
        "--resume",
        "-e",
        "--e",
        "--evaluate",
        "--seed",
        "--gpu",
        "--gup",
        "--world-size",
        "--rank",
        "--dist-url",
        "--dist-backend",
        "--addr",
        "--amp",
        "--opt-level",
        "--loss-scale-value",
        "--device",
        "--stop-step-num",
        "--eval-freq",
        "--multiprocessing-distributed",
        "--device-list",
    ]:
        assert re.search(rf"(^|[\s\[,]){re.escape(flag)}[\s,\]]", result.out), flag


# --- exact validation -------------------------------------------------------------------------------------------------


def test_validation_is_exact_for_any_number_of_processes_and_any_batch_size(folder37, tmp_path):
    """37 images: the counts of torchvision's own pipeline, from 1, 2 and 3 processes and several batch sizes."""
    import numpy as np
    from torchvision import transforms

    torch.manual_seed(3)
    network = TorchvisionVGG(2)
    path = str(tmp_path / "weights.pth")
    torch.save(network.state_dict(), path)
    pipeline = [
        transforms.Resize(round(48 * 256 / 224)),
        transforms.CenterCrop(48),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    data = torchvision.datasets.ImageFolder(os.path.join(folder37, "val"), transforms.Compose(pipeline))
    assert len(data) == 37
    with torch.no_grad():
        logits = network.eval()(torch.stack([image for image, _ in data]))
    correct = int((logits.argmax(1).numpy() == np.array(data.targets)).sum())
    assert 0 < correct < 37
    only_val = tmp_path / "only val"
    only_val.mkdir()
    shutil.copytree(os.path.join(folder37, "val"), str(only_val / "val"))
    common = [only_val, "-e", "--arch", "vgg11_bn", "--pretrained", path, "--image-size", 48, "--output-dir", tmp_path]
    three = ["--multiprocessing-distributed", "--device-list", "0,1,2"]
    for flags in (["-b", 7], ["-b", 1], ["-b256", "-j", 2], ["-b", 8, *TWO], ["-b", 9, *three]):
        result = run_main(*common, *flags)
        assert result.code == 0, result.err
        assert result.accuracy() == (f"{100 * correct / 37:.3f}", "100.000"), flags


def test_cifar10_trains_and_is_evaluated_on_two_processes(tmp_path):
    write_cifar(tmp_path / "cifar", binary=False, count=20)
    flags = [tmp_path / "cifar", "--arch", "vgg11", *TWO, "--output-dir", tmp_path / "o"]
    result = run_main(*flags, "-b", 50, "--epochs", 1, "--stop-step-num", 2)
    assert result.code == 0, result.err
    result = run_main(*flags, "-e", "--resume", tmp_path / "o" / "checkpoint.pth.tar")
    assert result.code == 0, result.err
    assert events(tmp_path / "o", "validate")[-1]["samples"] == 20


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [["--amp", "--ema-decay", "0.9"], [*TWO, "--ema-decay", "0.9", "--arch", "vgg11_bn"]],
    ids=["one process, amp, EMA", "two processes, EMA"],
)
def test_a_run_stopped_within_an_epoch_continues_bit_for_bit(folder, tmp_path, extra):
    if "--amp" in extra and not hasattr(torch, "autocast"):
        pytest.skip("this torch has no mixed precision on a CPU")
    flags = [folder, *SMALL, "-b", 6, "--epochs", 2, *extra]  # 4 steps per epoch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main(*flags, "--output-dir", whole).code == 0
    for stop, workers in ((2, 0), (100, 2)):
        resume = ["--resume", parts / "checkpoint.pth.tar"] if stop > 2 else []
        result = run_main(*flags, "--output-dir", parts, "--stop-step-num", stop, "-j", workers, *resume)
        assert result.code == 0, result.err
    first, second = (load(str(path / "checkpoint.pth.tar")) for path in (whole, parts))
    assert_same_weights(first["state_dict"], second["state_dict"])
    assert ("state_dict_ema" in first) == ("--ema-decay" in extra)
    if "--ema-decay" in extra:
        assert_same_weights(first["state_dict_ema"], second["state_dict_ema"])
        bias = "classifier.6.bias"
        assert not torch.equal(first["state_dict_ema"][bias], first["state_dict"][bias])
    for position, entry in first["optimizer"]["state"].items():
        assert torch.equal(entry["momentum_buffer"], second["optimizer"]["state"][position]["momentum_buffer"])
    for key in ("epoch", "step", "best_acc1"):
        assert first[key] == second[key], key


def test_a_run_continues_on_fewer_nodes_with_the_same_images(folder, tmp_path):
    """Two nodes stop within an epoch; one goes on with twice as many batches per step."""
    flags = [folder, *SMALL, "-b", 3, "--epochs", 1, "-p", 1]
    url = f"tcp://127.0.0.1:{free_port()}"

    def two_nodes(output, *more):
        words = ["--world-size", 2, "--dist-url", url, "--output-dir", output, *more]
        other = start_main(*flags, *words, "--rank", 1)
        result = run_main(*flags, *words, "--rank", 0)
        other.communicate(timeout=60)
        assert (result.code, other.returncode) == (0, 0), result.err

    two_nodes(tmp_path / "whole")
    two_nodes(tmp_path / "parts", "--stop-step-num", 1)
    result = run_main(*flags, "--output-dir", tmp_path / "parts", "--auto-resume")
    assert result.code == 0, result.err
    assert "=> resized to 1 node: 2 batches per step, so a step still has 6 images" in result.out
    whole, parts = (events(tmp_path / name, "epoch")[-1] for name in ("whole", "parts"))
    assert whole["samples"] == parts["samples"] == 24 and whole["step"] == parts["step"] == 4
    assert parts["loss"] == pytest.approx(whole["loss"], abs=0.05)  # dropout differs, images do not


def test_a_run_continues_within_an_epoch_with_another_batch_size(folder, tmp_path):
    flags = [folder, *SMALL, "--epochs", 1, "--output-dir", tmp_path, "-p", 1]
    assert run_main(*flags, "-b", 6, "--stop-step-num", 2).code == 0
    result = run_main(*flags, "-b", 4, "--auto-resume", "--hflip", 0.5, "--crop-scale", 0.08, 1)  # the defaults
    assert result.code == 0, result.err
    line = "=> resumed with 4 images per step, saved with 6: this epoch continues after its first 12 images"
    assert f"{line}\n" in result.out and "Epoch: [0][5/5]" in result.out
    assert events(tmp_path, "epoch")[-1]["samples"] == 24
    result = run_main(*flags, "-b", 6, "--auto-resume")
    assert result.code == 0 and "=> nothing left to train: epochs done: 1 of 1, steps: 5" in result.out


def test_images_that_do_not_fill_a_step_after_a_resume_are_counted(folder, tmp_path):
    flags = [folder, *SMALL, "--epochs", 1, "--output-dir", tmp_path]
    assert run_main(*flags, "-b", 6, "--stop-step-num", 2).code == 0
    result = run_main(*flags, "-b", 13, "--auto-resume")  # 12 images are left
    assert result.code == 0 and "after its first 12 images, without its last 12\n" in result.out, result.out


def test_a_compiled_run_continues_bit_for_bit(tmp_path):
    if TORCH < (2, 0):
        pytest.skip("torch.compile requires torch 2")
    flags = ["--arch", "vgg11", "-b", 64, "--compile"]
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    flags += ["--stop-step-num", 4, "--save-freq", 2]
    whole = run_main(*flags, "--output-dir", tmp_path / "whole", env=env)
    if "leave it out" in whole.err:
        pytest.skip(whole.err)  # no C++ compiler, or no headers of Python
    assert whole.code == 0, whole.err
    after_two_steps = tmp_path / "whole" / "checkpoint.pth.tar.previous"
    result = run_main(*flags, "--resume", after_two_steps, "--output-dir", tmp_path / "rest", env=env)
    assert result.code == 0, result.err
    assert events(tmp_path / "rest", "start")[0]["step"] == 2
    assert_same_weights(*(weights(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "rest")))


def test_loader_workers_overwrite_no_batch_that_is_still_needed(tmp_path):
    states = []
    for workers in (0, 1):
        output = tmp_path / str(workers)
        result = run_main("-b", 64, "--epochs", 1, "-j", workers, "--output-dir", output)  # 22 steps
        assert result.code == 0, result.err
        states.append(load(str(output / "checkpoint.pth.tar")))
    assert_same_weights(states[0]["state_dict"], states[1]["state_dict"])
    assert states[0]["best_acc1"] == states[1]["best_acc1"]


def test_stop_step_num_ends_cleanly_without_validation(folder, tmp_path):
    flags = [folder, *SMALL, "-b", 6, "--stop-step-num", 3, "--output-dir", tmp_path]
    result = run_main(*flags)
    assert result.code == 0 and "FPS@all" in result.out and "AVG-ACC" not in result.out
    result = run_main(*flags, "--auto-resume")
    assert result.code == 0 and "=> nothing left to train" in result.out and "model_best" not in result.out
    state = load(str(tmp_path / "checkpoint.pth.tar"))
    assert (state["epoch"], state["step_in_epoch"], state["step"]) == (0, 3, 3)


def test_auto_resume_falls_back_to_the_previous_checkpoint_and_says_so(folder, tmp_path):
    flags = [folder, *SMALL, "-b", 6, "--epochs", 3, "--output-dir", tmp_path, "--auto-resume", "--eval-freq", 9]
    assert run_main(*flags, "--stop-step-num", 4).code == 0
    assert run_main(*flags, "--stop-step-num", 5).code == 0
    path = tmp_path / "checkpoint.pth.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    result = run_main(*flags, "--stop-step-num", 5)
    assert result.code == 0 and "SHA-256" in result.err and f"resuming from '{path}.previous'" in result.out
    assert load(str(path))["step"] == 5


def test_a_checkpoint_of_the_reference_resumes(folder, tmp_path):
    """Names with module. and fc1…, momentum by position, apex's state under amp, the format of torch < 1.6."""
    torch.manual_seed(5)
    network = vgg.VGG("vgg11", 3)
    names = {"classifier.0": "fc1", "classifier.3": "fc2", "classifier.6": "fc3"}
    renamed = {}
    for name, value in network.state_dict().items():
        layer, _, kind = name.rpartition(".")
        renamed[f"module.{names.get(layer, layer)}.{kind}"] = value
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    path = str(tmp_path / "reference.pth.tar")
    state = {
        "epoch": 1,
        "arch": "vgg11",
        "state_dict": renamed,
        "best_acc1": torch.tensor(12.5),
        "optimizer": optimizer.state_dict(),
        "amp": {"loss_scaler0": {"loss_scale": 8.0, "unskipped": 3}},
    }
    torch.save(state, path, _use_new_zipfile_serialization=False)
    flags = [folder, *SMALL, "-b", 8, "--epochs", 2, "--resume", path, "--output-dir", tmp_path]
    result = run_main(*flags, program=MAIN)
    assert result.code == 0, result.err
    assert "Epoch: [1]" in result.out and "Epoch: [0]" not in result.out
    assert load(str(tmp_path / "checkpoint.pth.tar"))["best_acc1"] >= 12.5


def test_pretrained_weights_of_another_class_count_get_a_new_last_layer(trained, tmp_path):
    best = trained[0] / "model_best.pth.tar"
    flags = ["--arch", "vgg11", "--pretrained", best, "-b", 64, "--lr", 0.01, "--stop-step-num", 1]
    result = run_main(*flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert "classifier.6.weight: 3 classes" in result.out and "10 here: re-initialized" in result.out
    new, old = weights(tmp_path / "checkpoint.pth.tar"), weights(best)
    assert new["classifier.6.weight"].shape[0] == 10
    assert torch.allclose(new["features.0.weight"], old["features.0.weight"], atol=0.02)


def test_weights_of_another_class_count_are_not_evaluated(trained, tmp_path):
    best, bare = trained[0] / "model_best.pth.tar", tmp_path / "bare.pth"
    torch.save(weights(best), str(bare))
    for path, message in (
        (best, "number 0 is 'class 0' in the checkpoint and '0' in the data"),
        (bare, "classifier.6.weight: expected shape (10, 32), got (3, 32)"),
    ):
        result = run_main("-e", "--pretrained", path, "--output-dir", tmp_path / "o")
        assert result.code == 2 and message in result.err, result.err
    assert os.listdir(str(tmp_path / "o")) == []


def test_an_evaluation_takes_network_and_size_from_the_checkpoint(trained, folder, tmp_path):
    best = trained[0] / "model_best.pth.tar"
    for flag in ("--resume", "--pretrained"):
        result = run_main(folder, "-e", flag, best, "--output-dir", tmp_path)
        assert result.code == 0, result.err
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert (metrics["arch"], metrics["image_size"]) == ("vgg11", 32)
        assert metrics["acc1"] == pytest.approx(load(str(best))["best_acc1"])
        assert "epoch" not in events(tmp_path, "validate")[-1]  # it is no point of the training's curves


def test_an_evaluation_that_cannot_write_its_metrics_fails_at_once(trained, folder, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    result = run_main(folder, "-e", "--resume", trained[0] / "model_best.pth.tar", "--output-dir", tmp_path)
    assert result.code == 2 and "metrics.jsonl: Is a directory" in result.err and "Test:" not in result.out


def test_an_output_without_unicode_costs_no_run(folder, tmp_path):
    flags = [folder, *SMALL, "-b", 6, "--stop-step-num", 1, "--output-dir", tmp_path]
    result = run_main(*flags, env={"PYTHONIOENCODING": "ascii:strict"})
    assert result.code == 0 and r"on 1 \xd7 cpu" in result.out, result.err


def test_another_val_split_than_that_of_the_training_is_refused_and_changes_nothing(tmp_path):
    root = os.path.join(make_folder(tmp_path / "data"), "train")
    output = tmp_path / "o"
    flags = [root, *SMALL, "-b", 4, "--output-dir", output, "--epochs"]
    result = run_main(*flags, 1, "--val-split", 0.3)
    assert result.code == 0, result.err
    best = output / "model_best.pth.tar"
    names = ["args.json", "metrics.jsonl", "checkpoint.pth.tar"]
    before = [(output / name).read_bytes() for name in names]
    for more in (["-e", "--resume", best], ["-e", "--pretrained", best], ["--resume", best]):
        result = run_main(*flags, 2, "--val-split", 0.5, *more)  # without it: that of the checkpoint
        assert result.code == 2 and len(result.err.splitlines()) == 1, result.err
        assert "was trained with --val-split 0.3, this run has 0.5" in result.err
    assert [(output / name).read_bytes() for name in names] == before
    result = run_main(root, "-e", "--resume", best, "--output-dir", tmp_path / "e")
    assert result.code == 0 and json.loads((tmp_path / "e" / "metrics.json").read_text())["val_split"] == 0.3
    result = run_main(root, "-b", 4, "--lr", 0.01, "--output-dir", output, "--epochs", 2, "--auto-resume")
    assert result.code == 0 and "=> vgg11 on" in result.out and "32 pixels per side" in result.out, result.out
    result = run_main(
        root, "-b", 4, "--val-split", 0.3, "--output-dir", output, "--image-size", 32, "--stop-step-num", 1
    )
    assert result.code == 0 and "this run replaces" in result.err and "--auto-resume would continue" in result.err


@pytest.mark.parametrize("flag", ["--crop-scale", "--train-scale"])
@pytest.mark.parametrize("digits", [True, False])
def test_augmentation_that_does_not_fit_the_data_replaces_no_run(folder, tmp_path, digits, flag):
    """So nothing is said of the checkpoint that is there."""
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"of another run")
    bounds = [0.5, 1] if flag == "--crop-scale" else [48, 96]
    data = [] if digits else [folder, *SMALL, "-b", 6, "--image-size", 64]
    result = run_main(*data, flag, *bounds, "--stop-step-num", 1, "--output-dir", tmp_path)
    if digits or flag == "--train-scale":
        assert result.code == 2 and flag in result.err and len(result.err.splitlines()) == 1, result.err
        assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"of another run"
    else:
        assert result.code == 0 and "this run replaces" in result.err, result.err


def test_a_trace_is_written_and_compressed_gradients_stay_close(folder, tmp_path):
    """Two processes, 16 steps: bf16 on the network does change the weights, in their last digits."""
    if TORCH < (2, 0):
        pytest.skip("--grad-compress requires torch 2")
    flags = [folder, *SMALL, "-b", 6, "--epochs", 4, "--eval-freq", 4, *TWO]
    states = []
    for name, more in (("plain", ["--profile"]), ("bf16", ["--grad-compress", "bf16"])):
        result = run_main(*flags, *more, "--output-dir", tmp_path / name)
        assert result.code == 0, result.err
        state = weights(tmp_path / name / "checkpoint.pth.tar")
        states.append(torch.cat([value.flatten() for value in state.values()]))
        assert ("trace.json" in result.out) == (name == "plain")
    with open(str(tmp_path / "plain" / "trace.json")) as file:
        assert any("convolution" in event.get("name", "") for event in json.load(file)["traceEvents"])
    assert 0 < (states[1] - states[0]).norm() < 1e-2 * states[0].norm()


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_a_signal_saves_and_exits_with_75_and_leaves_no_temporary_file(folder, tmp_path, processes, monkeypatch):
    flags = [folder, *SMALL, "-b", "6", "--epochs", "1000", "--eval-freq", "1000", "--output-dir", tmp_path, *processes]
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    child = start_main(*flags, "-p", "1", "-j", 2)
    wait_for_line(child, "Epoch")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=120)
    assert child.returncode == 75
    state = load(str(tmp_path / "checkpoint.pth.tar"))
    assert state["step"] >= 1
    result = run_main(*flags, "--auto-resume", "--stop-step-num", state["step"] + 1)
    assert result.code == 0 and "resuming" in result.out, result.err
    assert load(str(tmp_path / "checkpoint.pth.tar"))["step"] == state["step"] + 1
    assert os.listdir(str(temporary)) == []


def test_a_signal_during_an_evaluation_is_one_line_and_leaves_no_temporary_file(trained, folder, tmp_path, monkeypatch):
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    flags = ["-e", "--resume", trained[0] / "checkpoint.pth.tar", "--output-dir", tmp_path]
    child = start_main(folder, *flags, "-b", 1, "-p", 1, "-j", 2)
    wait_for_line(child, "Test: [ 1/15]")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75 and len(err.splitlines()) == 1 and "there was nothing to save" in err, err
    assert os.listdir(str(temporary)) == []


def test_non_finite_steps_are_not_applied_and_ten_stop_the_run(folder, tmp_path):
    flags = [folder, *SMALL, "-b", 2, "--output-dir", tmp_path, "--epochs", 3]
    assert run_main(*flags, "--stop-step-num", 1).code == 0
    path = tmp_path / "checkpoint.pth.tar"
    before = path.read_bytes()
    # Step 2 is finite and ruins the weights; the saves at 3, 6 and 9 must not keep them, nor wait for a log line.
    result = run_main(*flags, "--lr", "1e30", "--resume", path, "-p", 1000, "--save-freq", 3)
    assert result.code == 1 and "not finite" in result.err and "Traceback" not in result.err
    assert result.out.count("skipped: non-finite gradients") == 3 and path.read_bytes() == before


def test_a_network_of_nans_is_not_evaluated_as_a_loss_of_zero(folder, tmp_path):
    flags = [folder, *SMALL, "-b", 4, "--output-dir", tmp_path]
    assert run_main(*flags, "--epochs", 1, "--stop-step-num", 1).code == 0
    ruined = {name: value * math.nan for name, value in weights(tmp_path / "checkpoint.pth.tar").items()}
    torch.save(ruined, str(tmp_path / "nan.pth"))
    result = run_main(*flags, "-e", "--pretrained", tmp_path / "nan.pth")
    assert result.code == 0 and "Loss    nan (   nan)" in result.out, result.out


# --- wrong use and bad input ------------------------------------------------------------------------------------------


def test_bad_data_and_bad_checkpoints_are_one_line_and_exit_code_2(folder, trained, tmp_path):
    other, empty, broken = (tmp_path / name for name in ("other classes", "empty class", "broken image"))
    for copy in (other, empty, broken):
        shutil.copytree(folder, str(copy))
    (other / "val" / "class 2").rename(other / "val" / "class 9")
    (empty / "train" / "nothing").mkdir()
    (broken / "train" / "class 0" / "图 000.JPEG").write_bytes(b"not an image")
    no_val = tmp_path / "no val"
    (no_val / "train").mkdir(parents=True)
    corrupt, good = tmp_path / "corrupt.pth.tar", trained[0] / "checkpoint.pth.tar"
    corrupt.write_bytes(good.read_bytes()[:10000])
    torch.save({}, str(tmp_path / "empty.pth"))
    for flags, word in (
        ([folder, "-b", 5000], "smaller --batch-size"),
        ([other], "'class 2' in train/ and 'class 9' in val/"),
        ([empty], "nothing: no images in it"),
        ([broken], "图 000.JPEG"),
        ([broken, *TWO], "图 000.JPEG"),
        ([no_val], "to split train/, use --data"),
        ([folder, "--resume", corrupt], "corrupt.pth.tar"),
        ([folder, "-e", "--resume", tmp_path / "empty.pth"], "holds no weights"),
        ([folder, "--resume", corrupt, *TWO], "corrupt.pth.tar"),
        ([folder, "--resume", good, "--arch", "vgg13"], "use --arch vgg11"),
        (["--resume", good], "'class 0' in the checkpoint"),
    ):
        common = ["--arch", "vgg11", "--image-size", 32, "-b", 6, "--epochs", 1, "--output-dir", tmp_path / "o"]
        result = run_main(*common, *flags)
        assert result.code == 2, (flags, result.out, result.err)
        assert len(result.err.splitlines()) == 1 and word in result.err, result.err


def spoil(folder: str) -> list[str]:
    """Put one of each kind of unreadable file into the training folder, and one into val. Returns their names."""
    with open(os.path.join(folder, "train", "class 0", "图 000.JPEG"), "rb") as file:
        content = file.read()
    gigapixels = content.replace(content[content.index(b"\xff\xc0") :][:9], b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff")
    files = {
        "train/class 0/truncated.JPEG": content[: len(content) // 2],
        "train/class 0/空.jpg": b"",
        "train/class 1/a\nb.png": b"text",
        "train/class 1/gigapixels.jpg": gigapixels,
        "train/class 2/half.webp": content[:9],
        "val/class 2/坏.JPEG": content[:700],
    }
    for name, data in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    os.symlink("nowhere", os.path.join(folder, "train", "class 2", "broken link.jpg"))
    os.mkdir(os.path.join(folder, "train", "class 2", "a folder.jpg"))
    return [*files, "train/class 2/broken link.jpg"]


@pytest.mark.parametrize("processes", [[], TWO], ids=["one process", "two processes"])
def test_unreadable_images_stop_the_run_or_are_skipped_and_listed(tmp_path, processes):
    clean, spoilt = make_folder(tmp_path / "clean"), make_folder(tmp_path / "spoilt")
    bad = spoil(spoilt)
    same = ["--arch", "vgg11", "--image-size", 32, "-b", 6, "--epochs", 1, *processes]
    stopped = run_main(spoilt, *same, "--output-dir", tmp_path / "o")
    assert stopped.code == 2 and len(stopped.err.splitlines()) == 1 and "--bad-images skip" in stopped.err, stopped.err
    assert sum(os.path.basename(name).replace("\n", "\\n") in stopped.err for name in bad) == 1
    skipped = run_main(spoilt, *same, "--output-dir", tmp_path / "skip", "--bad-images", "skip")
    assert skipped.code == 0, skipped.err
    assert "24 training images, 15 validation images" in skipped.out
    assert "skipping 7 unreadable images, listed in" in skipped.out
    listed = (tmp_path / "skip" / "bad_images.txt").read_text(encoding="utf-8").splitlines()
    expected = [os.path.join(spoilt, name).replace("\n", "\\n") for name in bad]
    assert sorted(line.split("\t")[0] for line in listed) == sorted(expected)
    # The rest is trained on as if the unreadable files had never been there.
    reference = run_main(clean, *same, "--output-dir", tmp_path / "clean out")
    assert reference.accuracy() == skipped.accuracy()
    losses = [[event["loss"] for event in events(tmp_path / name, "epoch")] for name in ("clean out", "skip")]
    assert losses[0] == losses[1]


def test_an_unreadable_image_of_a_folder_that_is_split_is_listed_once(tmp_path):
    root = os.path.join(make_folder(tmp_path / "data"), "train")
    with open(os.path.join(root, "class 1", "bad.jpg"), "wb") as file:
        file.write(b"no image")
    flags = [root, *SMALL, "-b", 4, "--val-split", 0.3, "--bad-images", "skip", "--output-dir", tmp_path / "o"]
    result = run_main(*flags, "--stop-step-num", 1)
    assert result.code == 0 and "=> skipping 1 unreadable image," in result.out, result.err
    assert len((tmp_path / "o" / "bad_images.txt").read_text(encoding="utf-8").splitlines()) == 1


def test_a_class_without_a_readable_image_is_named(tmp_path):
    root = make_folder(tmp_path)
    for name in os.listdir(os.path.join(root, "val", "class 1")):
        with open(os.path.join(root, "val", "class 1", name), "wb") as file:
            file.write(b"not an image")
    result = run_main(root, "--bad-images", "skip", "--arch", "vgg11", "-b", 6, "--output-dir", tmp_path / "o")
    assert result.code == 2 and "class 1: no readable image" in result.err and len(result.err.splitlines()) == 1


def test_a_report_without_matplotlib_is_refused(trained, folder, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
    )
    flags = [folder, *SMALL, "-e", "--resume", trained[0] / "checkpoint.pth.tar", "--report", tmp_path / "page"]
    result = run_main(*flags, "--output-dir", tmp_path, env={"PYTHONPATH": os.pathsep.join([str(hidden), *sys.path])})
    assert result.code == 2 and "--report requires matplotlib" in result.err, result.err
