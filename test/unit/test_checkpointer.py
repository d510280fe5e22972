# SPDX-License-Identifier: BSD-3-Clause
"""Finding the checkpoint to start from, continuing from it, and saying what has changed."""

from __future__ import annotations

import errno
import io
import os
from typing import Any

from engine.checkpoints import Checkpoint, Checkpointer, RunInfo, TrainState, checkpointer, file
from engine.checkpoints.checkpointer import BEST, LATEST
from engine.checkpoints.contents import load_checkpoint
from engine.errors import CheckpointError, UsageError
from engine.records import Totals

import vgg
from helpers.program import assert_same_weights
from helpers.saved import COUNTS, Run, SmallNet, comm, save

import pytest
import torch


def find(folder: Any, resume: Any = None, auto_resume: bool = False, **options: Any) -> Any:
    """Return (epoch of the checkpoint found; None if there is none)."""
    found = Checkpointer(str(folder), comm(), evaluate=False)
    found.find(resume and str(resume), auto_resume, options.get("pretrained"), None)
    return None if found.continued is None else found.continued.progress["epoch"]


def of_epoch(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "state_dict": {"a": torch.ones(1)}}


# --- finding a checkpoint ---------------------------------------------------------------------------------------------


def test_auto_resume_takes_the_newest_intact_checkpoint(tmp_path: Any, capsys: Any) -> None:
    assert find(tmp_path, auto_resume=True) is None
    path = tmp_path / LATEST
    for epoch in (1, 2):
        save(of_epoch(epoch), path)
    assert find(tmp_path, auto_resume=True) == 2
    assert find(tmp_path) is None
    assert capsys.readouterr().out == f"=> resuming from '{path}'\n"
    path.write_bytes(path.read_bytes()[:-9])
    assert find(tmp_path, auto_resume=True) == 1
    printed = capsys.readouterr()
    assert printed.out == f"=> resuming from '{path}.previous'\n"
    assert f"warning: {path}: corrupt" in printed.err and "trying the one before it" in printed.err
    # The next save must not keep the corrupt file in place of the intact one.
    assert not path.exists() and (tmp_path / f"{LATEST}.corrupt").exists()
    save(of_epoch(3), path)
    assert [load_checkpoint(str(path) + end).progress["epoch"] for end in ("", ".previous")] == [3, 1]


def test_a_file_system_that_fails_is_no_fresh_start(tmp_path: Any, monkeypatch: Any) -> None:
    def fail(folder: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpointer.os, "listdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        find(tmp_path, auto_resume=True)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOMEM, errno.ESTALE])
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9, 0.99])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_corrupt(
    tmp_path: Any, monkeypatch: Any, number: int, share: float
) -> None:
    """share: of the file that can be read."""
    path = save({**of_epoch(1), "state_dict": {"a": torch.ones(100_000)}}, tmp_path / LATEST)
    save({**of_epoch(2), "state_dict": {"a": torch.ones(100_000)}}, tmp_path / LATEST)
    limit = share * os.path.getsize(path)

    class FailingFile(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() + len(memoryview(buffer)) > limit and self.name == str(path):
                raise OSError(number, os.strerror(number))
            return super().readinto(buffer) or 0

        def readall(self) -> bytes:
            content = bytearray(os.path.getsize(self.name) - self.tell())
            self.readinto(content)
            return bytes(content)

    def open_failing(name: Any, mode: str) -> Any:
        return io.BufferedReader(FailingFile(name, mode), 512)

    monkeypatch.setattr(file, "open", open_failing, raising=False)
    with pytest.raises(CheckpointError, match=f"{os.strerror(number)}; .* rename it to continue from .*previous"):
        find(tmp_path, auto_resume=True)
    monkeypatch.undo()
    assert find(tmp_path, auto_resume=True) == 2


@pytest.mark.parametrize("names", [[LATEST], [f"{LATEST}.previous"], [LATEST, f"{LATEST}.previous"]])
def test_auto_resume_never_starts_afresh_over_corrupt_checkpoints(tmp_path: Any, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"corrupt")
    with pytest.raises(CheckpointError, match="corrupt, or not a checkpoint"):
        find(tmp_path, auto_resume=True)


def test_a_checkpoint_that_was_asked_for_must_be_intact(tmp_path: Any) -> None:
    path = save(of_epoch(1), tmp_path / "x")
    assert find(tmp_path, path, auto_resume=True) == 1
    (tmp_path / "x").write_bytes(b"corrupt")
    save(of_epoch(2), tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="x: corrupt"):
        find(tmp_path, path, auto_resume=True)


# --- continuing -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_as_one_that_was_never_stopped(tmp_path: Any) -> None:
    """Through a file: weights, momentum and averages."""
    stopped = Run().train(3)
    stopped.state.epoch, stopped.state.best_acc1 = 1, 61.5
    stopped.state.best_value, stopped.state.since_best = 60.5, 2
    path = save(stopped.content(), tmp_path / "x")
    resumed = Run(seed=1).resume(path)
    assert resumed.state == TrainState(
        epoch=1, step_in_epoch=3, images_in_epoch=0, step=3, best_acc1=61.5, best_value=60.5, since_best=2
    )
    assert resumed.counter.read() == COUNTS
    ours, theirs = resumed.train(4).content(), stopped.train(4).content()
    assert list(ours) == list(theirs)
    for key in ("state_dict", "state_dict_ema"):
        assert_same_weights(ours[key], theirs[key])
    for position, buffers in theirs["optimizer"]["state"].items():
        momentum = ours["optimizer"]["state"][position]["momentum_buffer"]
        assert torch.equal(momentum, buffers["momentum_buffer"])
    before = load_checkpoint(path).weights
    assert not torch.equal(ours["state_dict"]["features.0.weight"], before["features.0.weight"])


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("links", [True, False], ids=["links", "another file system"])
def test_the_best_model_goes_along_into_another_folder(
    tmp_path: Any, monkeypatch: Any, links: bool, relative: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    run = Run().train(3)
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    path = save(run.content(), tmp_path / "first" / LATEST)
    if relative:
        monkeypatch.chdir(tmp_path / "first")
        path = LATEST
    save(of_epoch(1), tmp_path / "first" / BEST)
    save(of_epoch(7), tmp_path / "third" / BEST)
    for name, expected in (("first", 1), ("second", 1), ("third", 7)):  # that of another run there stays
        Run(seed=1).resume(path, folder=tmp_path / name)
        assert load_checkpoint(str(tmp_path / name / BEST)).progress["epoch"] == expected
    (tmp_path / "fourth").mkdir()
    Run(seed=1).resume(path, rank=1, folder=tmp_path / "fourth")
    assert not (tmp_path / "fourth" / BEST).exists()


@pytest.mark.parametrize(
    "names, replaced, hint",
    [
        ([], None, None),
        ([BEST], BEST, "--output-dir DIR keeps it"),
        ([LATEST], LATEST, "--auto-resume would continue that run"),
        ([LATEST, BEST], LATEST, "--auto-resume would continue that run"),
    ],
)
def test_a_new_run_warns_that_it_replaces_an_earlier_one(
    tmp_path: Any, capsys: Any, names: list[str], replaced: str | None, hint: str | None
) -> None:
    for name in names:
        save(of_epoch(1), tmp_path / name)
    run = Run()
    Checkpointer(str(tmp_path), comm(), evaluate=False).log_changes(run.state, run.ema, 100)
    printed = capsys.readouterr().err
    if replaced is None:
        assert printed == ""
    else:
        assert f"this run replaces {tmp_path / replaced}, the checkpoint of an earlier run; {hint}" in printed
        assert len(printed.splitlines()) == 1


def test_the_counts_of_an_epoch_continue_on_the_main_process_alone(tmp_path: Any) -> None:
    content = Run().train(2).content()
    path = save(content, tmp_path / "x")
    assert Run().resume(path, rank=0).counter.read() == COUNTS
    assert Run().resume(path, rank=1).counter.read() == Totals()
    assert Run().resume(save({**content, "step_in_epoch": 0}, tmp_path / "y")).counter.read() == Totals()


@pytest.mark.parametrize("missing", ["optimizer", "epoch", "counts"])
def test_a_checkpoint_that_lacks_something_names_it(tmp_path: Any, missing: str) -> None:
    content = Run().train(2).content()
    del content[missing]
    with pytest.raises(UsageError, match=f"{missing}.*--pretrained"):
        Run().resume(save(content, tmp_path / "x"))


@pytest.mark.parametrize("key, value", [("epoch", -3), ("epoch", float("inf")), ("counts", [1, 2]), ("optimizer", 5)])
def test_progress_that_makes_no_sense_is_one_line(tmp_path: Any, key: str, value: Any) -> None:
    path = save({**Run().train(2).content(), key: value}, tmp_path / "x")
    with pytest.raises(UsageError, match="--pretrained"):
        Run().resume(path)


@pytest.mark.parametrize("number", [2, 1 << 20])
def test_an_optimizer_of_another_model_is_an_error_of_one_line(tmp_path: Any, number: int) -> None:
    content = Run().train(2).content()
    content["optimizer"]["param_groups"][0]["params"] = list(range(number))
    with pytest.raises(UsageError, match=f"expected the state of 10 parameters, got {number}"):
        Run().resume(save(content, tmp_path / "x"))
    content = Run().train(2).content()
    content["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(UsageError, match=r"momentum of parameter 0: expected shape \(4, 3, 3, 3\), got \(5,\)"):
        Run().resume(save(content, tmp_path / "x"))


def test_a_checkpoint_of_another_run_is_refused_with_both_values(tmp_path: Any) -> None:
    path = save(Run().train(2).content(), tmp_path / "x")

    def check(evaluate: bool = False, **info: Any) -> None:
        found = Checkpointer(str(tmp_path), comm(), evaluate=evaluate)
        found.find(path, False, None, None)
        found.check(Run(**info).info)

    check()
    with pytest.raises(UsageError, match="vgg16.* vgg19.*--arch vgg16"):
        check(arch="vgg19")
    with pytest.raises(UsageError, match="number 1 is 'b' in the checkpoint and 'x' in the data"):
        check(classes=["a", "x", "c", "d"])
    check(images_per_step=24)  # continues at the next image
    with pytest.raises(UsageError, match="seed 7.* 8"):
        check(identity={"seed": 8})
    check(identity={"seed": 8}, evaluate=True)
    with pytest.raises(UsageError, match="mixup 0.2.*--pretrained"):
        check(identity={"seed": 7, "augmentation": "mixup 0.2"})
    save({**Run().train(2).content(), "step_in_epoch": 0}, tmp_path / "x")
    check(identity={"seed": 8})  # between epochs it may change


# --- what has changed -------------------------------------------------------------------------------------------------


def test_a_run_that_continues_as_it_was_saved_says_nothing(tmp_path: Any, capsys: Any) -> None:
    Run().resume(save(Run().train(2).content(), tmp_path / "x"))
    content = {**Run(decoder="Pillow").train(2).content(), "epoch": 1, "step_in_epoch": 0}
    Run(decoder="simplejpeg").resume(save(content, tmp_path / "x"))  # between epochs
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "saved, now, words",
    [
        ({"decoder": "Pillow"}, {"decoder": "simplejpeg"}, ["simplejpeg", "Pillow", "gray level"]),
        ({"world_size": 8}, {"world_size": 1}, ["1 process,", "8"]),
        ({"images_per_step": 12}, {"images_per_step": 24}, ["24 images per step", "12", "without its last 4"]),
        ({"ema": False}, {"ema": True}, ["no EMA weights"]),
        ({"ema": True}, {"ema": False}, ["EMA weights", "dropped", "--ema-decay"]),
    ],
    ids=["decoder", "processes", "images per step", "an EMA starts", "an EMA ends"],
)
def test_what_differs_from_the_run_that_saved_is_logged(
    tmp_path: Any, capsys: Any, saved: dict[str, Any], now: dict[str, Any], words: list[str]
) -> None:
    Run(**now).resume(save(Run(**saved).train(2).content(), tmp_path / "x"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("=> ") and all(word in line for word in words), line


def test_another_measure_of_the_best_starts_again_and_an_older_checkpoint_knows_acc1(
    tmp_path: Any, capsys: Any
) -> None:
    stopped = Run().train(2)
    stopped.state.best_acc1 = stopped.state.best_value = 61.5
    resumed = Run()
    resumed.state.best_by = "macro_f1"
    assert (
        resumed.resume(save(stopped.content(), tmp_path / "x")).state.best_value == 0.0
        and resumed.state.best_acc1 == 61.5
    )
    assert "resumed with --best macro_f1, saved with acc1" in capsys.readouterr().out
    older = stopped.content()
    for key in ("best_by", "best_value", "since_best"):
        del older[key]
    assert Run().resume(save(older, tmp_path / "y")).state.best_value == 61.5 and capsys.readouterr().out == ""


# --- pretrained weights -----------------------------------------------------------------------------------------------


def test_pretrained_weights_of_other_classes_keep_a_new_last_layer(tmp_path: Any, capsys: Any) -> None:
    network: Any = SmallNet(num_classes=2)
    content = Run().train(1).content()
    before = network.state_dict()[f"{vgg.HEADS['paper'][-1]}.weight"].clone()
    found = Checkpointer(str(tmp_path), comm(), evaluate=False)
    path = save(content, tmp_path / "x.pth")
    found.find(None, False, path, None)
    found.load_weights(network)
    after = network.state_dict()
    assert torch.equal(after[f"{vgg.HEADS['paper'][-1]}.weight"], before)
    assert torch.equal(after["classifier.3.weight"], content["state_dict_ema"]["classifier.3.weight"])
    out = capsys.readouterr().out
    assert f"=> classifier.6.weight: 4 classes in {path}, 2 here" in out
    assert f"=> loaded the EMA weights of '{path}'" in out


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("classes", [["a"], ["a", "c"], ["a", "b", "c"], ["b", "a"]])
def test_other_classes_name_the_flag_that_starts_from_the_weights(evaluate: bool, classes: list[str]) -> None:
    found = Checkpointer(".", comm(), evaluate=evaluate)
    found.continued = Checkpoint("x", {}, info=RunInfo(classes=["a", "b"]))
    with pytest.raises(UsageError, match="the classes differ") as caught:
        found.check(RunInfo("vgg11", classes, {}, 1, 1))
    assert ("--pretrained" in str(caught.value)) != evaluate


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EIO"])
def test_a_full_disk_is_told_what_to_do(number: str) -> None:
    advice = checkpointer._advice(OSError(getattr(errno, number), "x"))
    assert ("--auto-resume" in advice) == (number != "EIO")
