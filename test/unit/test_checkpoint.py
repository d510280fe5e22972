# SPDX-License-Identifier: BSD-3-Clause
"""What a checkpoint holds, and what continues from it."""

import vgg
from engine.checkpoints.contents import (
    ModelInfo,
    TrainState,
    build_checkpoint,
    check_resumable,
    load_checkpoint,
    load_pretrained,
    load_weights,
    log_changes,
    model_weights,
    restore,
)
from engine.checkpoints.file import CheckpointWriter
from engine.device.compute import ComputeDevice
from engine.device.step import ModelEma
from engine.errors import CheckpointError, UsageError
from engine.records.logger import Logger
from engine.records.metrics import AccuracyCounter, Totals
from helpers.program import assert_same_weights

import pytest
import torch
from torch import nn

COUNTS = Totals(24.0, 10.0, 20.0, 30.5)


class SmallNet(nn.Module):
    """A VGG of one layer of each kind; the last one is classifier.6, as in VGG."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Linear(4, 8),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Identity(),
            nn.Linear(8, num_classes),
        )

    def forward(self, images):
        return self.classifier(self.features(images).mean((2, 3)))


class Run:
    """The parts of a training run that a checkpoint holds."""

    def __init__(self, seed=0, ema=True, **info):
        torch.manual_seed(seed)
        self.network, self.state = SmallNet(), TrainState()
        accelerator = ComputeDevice("cpu")
        self.scaler = accelerator.prepare_training(self.network, lr=0.1, momentum=0.9, weight_decay=1e-4)
        self.ema = ModelEma(self.network, self.scaler.weights, self.scaler.master_weights) if ema else None
        self.counter = AccuracyCounter(accelerator.device)
        self.info = ModelInfo(
            **{
                "arch": "vgg16",
                "classes": ["a", "b", "c", "d"],
                "preprocessing": {"image_size": 8},
                "identity": {"seed": 7, "global batch": 12},
                "decoder": "simplejpeg",
                "world_size": 1,
                **info,
            }
        )

    def train(self, steps):
        """Take steps whose images depend on nothing but the number of the step."""
        for _ in range(steps):
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(self.state.step))
            self.scaler.backward(self.network(images).square().mean())
            self.scaler.step()
            self.state.step += 1
            self.state.step_in_epoch += 1
            if self.ema is not None:
                self.ema.update(0.9, self.state.step, self.scaler.skipped)
        return self

    def checkpoint(self, totals=COUNTS):
        return build_checkpoint(self.state, totals, self.info, self.scaler, self.ema)

    def resume(self, checkpoint, rank=0):
        load_weights(self.network, model_weights(checkpoint, "--resume", ema=False), "--resume")
        restore(checkpoint, self.state, self.counter, self.scaler, self.ema, rank)
        log_changes(checkpoint, self.info, self.state, self.ema, 100, Logger(writes=False))
        return self


@pytest.fixture
def logger():
    return Logger(writes=False)


def save(state, path):
    writer = CheckpointWriter()
    writer.save(state, str(path))
    assert writer.wait() is None
    return str(path)


# --- what a checkpoint holds ------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_a_run_continues_from(tmp_path):
    """Through a file: a resumed run ends with the weights, momentum and averages of one that was never stopped."""
    stopped = Run().train(3)
    stopped.state.epoch, stopped.state.best_acc1 = 1, 61.5
    checkpoint = load_checkpoint(save(stopped.checkpoint(), tmp_path / "x"))
    resumed = Run(seed=1).resume(checkpoint)
    assert resumed.state == TrainState(epoch=1, step_in_epoch=3, step=3, best_acc1=61.5)
    assert resumed.counter.read() == COUNTS
    ours, theirs = resumed.train(4).checkpoint(), stopped.train(4).checkpoint()
    assert list(ours) == list(theirs)
    for key in ("state_dict", "state_dict_ema"):
        assert_same_weights(ours[key], theirs[key])
    for position, buffers in theirs["optimizer"]["state"].items():
        momentum = ours["optimizer"]["state"][position]["momentum_buffer"]
        assert torch.equal(momentum, buffers["momentum_buffer"])
    assert not torch.equal(ours["state_dict"]["features.0.weight"], checkpoint["state_dict"]["features.0.weight"])


def test_a_checkpoint_holds_plain_values_and_fp32_tensors_on_the_cpu(tmp_path):
    checkpoint = Run().train(1).checkpoint()
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "amp"} <= set(checkpoint)  # the reference's
    assert checkpoint["counts"] == list(COUNTS) and checkpoint["decoder"] == "simplejpeg"
    assert checkpoint["preprocessing"] == {"image_size": 8} and checkpoint["classes"] == ["a", "b", "c", "d"]
    for name, tensor in checkpoint["state_dict"].items():
        assert tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64), name
    save(checkpoint, tmp_path / "x")
    options = {"weights_only": True} if "weights_only" in torch.load.__code__.co_varnames else {}
    assert torch.load(str(tmp_path / "x"), **options)["step"] == 1


# --- continuing -------------------------------------------------------------------------------------------------------


def test_resuming_mid_epoch_with_another_decoder_says_so(capsys):
    checkpoint = Run(decoder="Pillow").train(2).checkpoint()
    Run(decoder="simplejpeg").resume(checkpoint)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resumed with" in line]
    assert line.startswith("=> resumed with simplejpeg, saved with Pillow: the rest of this epoch's JPEGs may differ")


def test_resuming_with_the_same_decoder_or_between_epochs_says_nothing(capsys):
    run = Run(decoder="Pillow").train(2)
    Run(decoder="Pillow").resume(run.checkpoint())
    run.state.epoch, run.state.step_in_epoch = 1, 0
    Run(decoder="simplejpeg").resume(run.checkpoint())
    assert capsys.readouterr().out == ""


def test_resuming_on_another_number_of_processes_says_so(capsys):
    Run(world_size=1).resume(Run(world_size=8).train(2).checkpoint())
    assert "=> resumed on 1 processes, saved on 8: the same images in the same order" in capsys.readouterr().out


def test_the_counts_of_an_epoch_continue_on_the_main_process_alone():
    checkpoint = Run().train(2).checkpoint()
    assert Run().resume(checkpoint, rank=0).counter.read() == COUNTS
    assert Run().resume(checkpoint, rank=1).counter.read() == Totals()
    checkpoint["step_in_epoch"] = 0
    assert Run().resume(checkpoint, rank=0).counter.read() == Totals()


def test_an_ema_that_starts_or_ends_at_a_resume_is_logged(capsys):
    Run(ema=True).resume(Run(ema=False).train(2).checkpoint())
    assert "=> the checkpoint has no EMA weights: the EMA starts from the current weights" in capsys.readouterr().out
    Run(ema=False).resume(Run(ema=True).train(2).checkpoint())
    assert "=> the EMA weights of the checkpoint are dropped" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["optimizer", "epoch", "counts"])
def test_a_checkpoint_that_lacks_something_names_it(missing):
    checkpoint = Run().train(2).checkpoint()
    del checkpoint[missing]
    with pytest.raises(UsageError, match=f"training cannot continue.*{missing}.*--pretrained takes its weights alone"):
        Run().resume(checkpoint)


@pytest.mark.parametrize("number", [2, 1 << 20])
def test_an_optimizer_of_another_model_is_an_error_of_one_line(number):
    checkpoint = Run().train(2).checkpoint()
    checkpoint["optimizer"]["param_groups"][0]["params"] = list(range(number))
    with pytest.raises(UsageError, match=f"expected the state of 10 parameters, got {number}"):
        Run().resume(checkpoint)
    checkpoint = Run().train(2).checkpoint()
    checkpoint["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(UsageError, match=r"momentum of parameter 0: expected shape \(4, 3, 3, 3\), got \(5,\)"):
        Run().resume(checkpoint)


def test_a_checkpoint_of_another_run_is_refused_with_both_values():
    run = Run().train(2)
    checkpoint = run.checkpoint()
    check_resumable(checkpoint, run.info, evaluate=False)
    with pytest.raises(UsageError, match="holds vgg16, this run uses vgg19: use --arch vgg16"):
        check_resumable(checkpoint, Run(arch="vgg19").info, evaluate=False)
    with pytest.raises(UsageError, match="number 1 is 'b' in the checkpoint and 'x' in the data"):
        check_resumable(checkpoint, Run(classes=["a", "x", "c", "d"]).info, evaluate=False)
    other = Run(identity={"seed": 7, "global batch": 24}).info
    check_resumable(checkpoint, other, evaluate=False)  # continues at the next image
    other = Run(identity={"seed": 8, "global batch": 12}).info
    with pytest.raises(UsageError, match="within an epoch with seed 7, this run has 8"):
        check_resumable(checkpoint, other, evaluate=False)
    check_resumable(checkpoint, other, evaluate=True)
    with pytest.raises(UsageError, match="or take its weights alone with --pretrained"):
        check_resumable(checkpoint, Run(identity={"seed": 7, "augmentation": "mixup 0.2"}).info, evaluate=False)
    check_resumable({**checkpoint, "step_in_epoch": 0}, other, evaluate=False)  # between epochs it may change


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value",
    [
        ("arch", 5),
        ("classes", "abc"),
        ("preprocessing", [224]),
        ("preprocessing", {"image_size": "abc"}),
        ("preprocessing", {"image_size": -5}),
        ("preprocessing", {"mean": None}),
        ("preprocessing", {"mean": [0.5] * 3, "std": [0.5]}),
        ("val_split", "0.1"),
        ("identity", [1]),
        ("batch", 256),
        ("batch", {"batch_size": 8, "accum_steps": 1}),
        ("batch", {"batch_size": 8, "accum_steps": 1, "images_per_step": 0}),
    ],
)
def test_an_entry_that_cannot_be_ours_is_left_out(tmp_path, key, value):
    assert load_checkpoint(save({"epoch": 1, key: value}, tmp_path / "x")) == {"epoch": 1}


@pytest.mark.parametrize("key, value", [("epoch", -3), ("epoch", float("inf")), ("counts", [1, 2]), ("optimizer", 5)])
def test_progress_that_makes_no_sense_is_one_line(key, value):
    run = Run().train(2)
    with pytest.raises(
        UsageError, match="cannot continue from this checkpoint .* --pretrained takes its weights alone"
    ):
        Run().resume({**run.checkpoint(), key: value})


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="x: holds a list, not a checkpoint"):
        load_checkpoint(save([1, 2], tmp_path / "x"))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_found_in_a_checkpoint_and_in_a_plain_state_dict():
    checkpoint = Run().train(2).checkpoint()
    assert_same_weights(model_weights(checkpoint, "x"), checkpoint["state_dict_ema"])
    assert_same_weights(model_weights(checkpoint, "x", ema=False), checkpoint["state_dict"])
    assert_same_weights(model_weights(checkpoint["state_dict"], "x"), checkpoint["state_dict"])
    of_the_reference = {
        "module.features.0.weight": torch.zeros(1),
        "module.fc1.weight": torch.ones(1),
        "module.fc3.bias": torch.ones(2),
    }
    names = list(model_weights({"state_dict": of_the_reference}, "x"))
    assert names == ["features.0.weight", "classifier.0.weight", "classifier.6.bias"]


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 1}, {"state_dict": {}}, {"state_dict": {"a": 1}}, {"state_dict": [1]}]
)
def test_a_file_without_weights_is_named(content):
    with pytest.raises(UsageError, match="x.pth: holds no weights"):
        model_weights(content, "x.pth")


def test_weights_that_do_not_fit_are_named():
    weights = dict(SmallNet().state_dict())
    weights["features.0.weight"] = torch.zeros(5, 3, 3, 3)
    message = r"x.pth: features.0.weight: expected shape \(4, 3, 3, 3\), got \(5, 3, 3, 3\); check --arch"
    with pytest.raises(UsageError, match=message):
        load_weights(SmallNet(), weights, "x.pth")


def test_pretrained_weights_of_other_classes_keep_a_new_last_layer(logger, capsys):
    network, pretrained = SmallNet(num_classes=2), Run().train(1).checkpoint()
    before = network.state_dict()[f"{vgg.LAST_LAYER}.weight"].clone()
    load_pretrained(network, pretrained, "x.pth", logger)
    after = network.state_dict()
    assert torch.equal(after[f"{vgg.LAST_LAYER}.weight"], before)
    assert torch.equal(after["classifier.3.weight"], pretrained["state_dict_ema"]["classifier.3.weight"])
    out = capsys.readouterr().out
    assert "=> classifier.6.weight: 4 classes in x.pth, 2 here: re-initialized" in out
    assert "=> loaded the EMA weights of 'x.pth'" in out
