# SPDX-License-Identifier: BSD-3-Clause
"""Log lines, metrics.jsonl, TensorBoard's events, and what happens if none of them can be written."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types
from typing import Any, Sequence

from engine import console
from engine.records import logger as logger_module
from engine.records.curves import read_events
from engine.records.logger import Logger, ProgressMeter
from engine.records.metrics import AccuracyCounter, Totals, read_snapshots

from helpers.program import events

import pytest
import torch

FIELD = r"[ \d.]{6} \([ \d.]{6}\)"
LOSS = r"\d+\.\d{8}"
LINE = re.compile(
    rf"(Epoch: \[\d+\]\[ *\d+/\d+\]\tTime {FIELD}\tData {FIELD}|Test: \[ *\d+/\d+\]\tTime {FIELD})"
    rf"\tLoss {LOSS} \({LOSS}\)\tAcc@1 {FIELD}\tAcc@5 {FIELD}"
)
full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full stands in for a full disk")


# --- the lines that other programs parse ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: Any) -> list[float]:
    """A clock to set: [seconds]."""
    now = [50.0]
    monkeypatch.setattr(logger_module.time, "perf_counter", lambda: now[0])
    return now


class Counter(AccuracyCounter):
    """Counts one batch a call, whose metrics are given."""

    def __init__(self, totals: Sequence[float] = (0, 0, 0, 0)) -> None:
        super().__init__(torch.device("cpu"))
        self.load(totals)

    def add(self, loss: float, images: int = 8, correct1: int = 0, correct5: int = 0) -> Counter:
        self.counts = self.counts + torch.tensor([images, correct1, correct5])
        self.loss_sum = self.loss_sum + loss * images
        self.batches.append((torch.tensor(loss), images))
        return self


def test_a_line_has_the_last_steps_and_in_parentheses_the_epoch(clock: list[float], capsys: Any) -> None:
    meter, counter = ProgressMeter("Epoch: [3]", 5004, 10), Counter()
    clock[0] += 1.0
    meter.add_data_time(0.5)
    assert meter.step(1, counter.add(2.0, 8, 2, 4)) == Totals(8, 2, 4, 16.0)
    clock[0] += 0.9
    meter.add_data_time(0.09)
    for done in range(2, 11):
        totals = meter.step(done, counter.add(1.0, 8, 8, 8))
        assert (totals is not None) == (done == 10)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch: [3][   1/5004]\tTime  1.000 ( 1.000)\tData  0.500 ( 0.500)\tLoss 2.00000000 (2.00000000)"
        "\tAcc@1  25.00 ( 25.00)\tAcc@5  50.00 ( 50.00)",
        "Epoch: [3][  10/5004]\tTime  0.100 ( 0.190)\tData  0.010 ( 0.059)\tLoss 1.00000000 (1.10000000)"
        "\tAcc@1 100.00 ( 92.50)\tAcc@5 100.00 ( 95.00)",
    ]


def test_a_resumed_epoch_continues_its_means_but_not_its_times(clock: list[float], capsys: Any) -> None:
    earlier = Totals(80, 0, 0, 800.0)
    meter, counter = ProgressMeter("Epoch: [0]", 20, 2, 0.0, 10, earlier), Counter(earlier)
    clock[0] += 2.0
    assert meter.step(11, counter.add(0.75, 8, 8, 8)) is None
    assert meter.step(12, counter.add(1.25, 8, 8, 8)) == Totals(96, 16, 16, 816.0)
    assert capsys.readouterr().out == (
        "Epoch: [0][12/20]\tTime  1.000 ( 1.000)\tData  0.000 ( 0.000)\tLoss 1.00000000 (8.50000000)"
        "\tAcc@1 100.00 ( 16.67)\tAcc@5 100.00 ( 16.67)\n"
    )


def test_lines_that_wait_for_a_reading_have_their_own_loss_and_share_their_time(
    clock: list[float], capsys: Any, monkeypatch: Any
) -> None:
    """With a line per step and a reading per second: at the first step, after a second, and at the last step."""
    readings = []
    monkeypatch.setattr(
        logger_module, "read_snapshots", lambda some: readings.append(len(some)) or read_snapshots(some)
    )
    losses = [0.1, 1 / 3, 7.0, math.nan, 2e-8, 123.456, 1.0]
    meter, counter, read = ProgressMeter("Epoch: [0]", 7, 1, wait=1.0), Counter(), []
    for done, loss in enumerate(losses, 1):
        clock[0] += 0.3
        read.append(meter.step(done, counter.add(loss, 8, done)) is not None)
    assert read == [True, False, False, False, True, False, True] and readings == [1, 4, 2]
    lines = [re.split(r"\t\w[\w@]+ +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"Epoch: [0][{done}/7]" for done in range(1, 8)]
    assert [line[1].split()[0] for line in lines] == ["0.300"] * 7
    assert [line[3].split()[0] for line in lines] == [f"{torch.tensor(loss).item():.8f}" for loss in losses]
    assert [line[4].split()[0] for line in lines] == [f"{12.5 * done:.2f}" for done in range(1, 8)]


def test_a_run_that_stops_prints_its_last_step_at_once(clock: list[float], capsys: Any) -> None:
    meter, counter = ProgressMeter("Epoch: [0]", 100, 10, wait=1.0), Counter()
    assert [meter.step(done, counter.add(1.0), stopping=done == 3) is None for done in (1, 2, 3)] == [
        False,
        True,
        False,
    ]
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("prefix", ["Epoch: [0]", "Test: "])
@pytest.mark.parametrize("values", [(0.0, 0, 0, 0), (24691.2, 5, 5, 5), (0.5, 3, 1, 2)])
def test_every_line_has_the_shape_that_is_parsed(prefix: str, values: Any, capsys: Any) -> None:
    """Without images too: the last batch of a process may be empty."""
    meter, counter = ProgressMeter(prefix, 7, has_data=prefix != "Test: "), Counter()
    for done in (1, 2, 7):
        meter.step(done, counter.add(*values) if done < 7 else counter)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(map(LINE.fullmatch, lines)), lines


# --- who prints and who writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prints, writes", [(True, True), (True, False), (False, False)])
def test_local_main_processes_print_and_rank_0_writes(
    tmp_path: Any, capsys: Any, monkeypatch: Any, prints: bool, writes: bool
) -> None:
    monkeypatch.setattr(console, "_prints", prints)
    logger = Logger(str(tmp_path), writes=writes)
    console.line("=> a line")
    logger.event("train", loss=1.0, step=1)
    logger.close()
    assert (capsys.readouterr().out == "=> a line\n") == prints
    assert os.path.exists(str(tmp_path / "metrics.jsonl")) == writes
    assert bool(os.listdir(str(tmp_path))) == writes


def test_metrics_are_appended_and_hold_no_nan(tmp_path: Any) -> None:
    for step, loss in enumerate([1.5, math.nan, math.inf]):
        logger = Logger(str(tmp_path), writes=True)
        logger.event("train", loss=loss, step=step)
        logger.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()
    assert [record["loss"] for record in events(tmp_path)] == [1.5, None, None]


def test_events_after_half_a_line_have_lines_of_their_own(tmp_path: Any) -> None:
    """As a power cut leaves the file, at any byte, perhaps with zeros behind it."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"event": "epoch", "step": 5, "epoch": 0}\n{"event": "epoch", "step": 9, "epoch": 1}\n'
    for content in [whole[:length] + zeros for length in range(len(whole) + 1) for zeros in (b"", b"\0" * 9)]:
        path.write_bytes(content)
        logger = Logger(str(tmp_path), writes=True)
        logger.event("start", step=5)
        logger.event("epoch", step=9, epoch=1, loss=2.0)
        logger.close()
        start, epoch = path.read_bytes().splitlines()[-2:]
        assert (json.loads(start)["event"], json.loads(epoch)["loss"]) == ("start", 2.0)
        assert path.read_bytes().startswith(content) and b"\n\n" not in path.read_bytes()
        assert read_events(str(tmp_path))[0][-1]["loss"] == 2.0


@pytest.mark.parametrize("writes", [True, False])
def test_flags_are_written_by_rank_0(tmp_path: Any, writes: bool) -> None:
    Logger(str(tmp_path), writes=writes).write_args({"flags": {"lr": 0.1, "data": "图 \udcff"}, "commit": None})
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"] * writes
    if writes:
        record = json.loads((tmp_path / "args.json").read_text(encoding="utf-8"))
        assert record == {"flags": {"lr": 0.1, "data": "图 \udcff"}, "commit": None}


def test_metrics_are_complete_while_the_run_goes_on(tmp_path: Any) -> None:
    logger = Logger(str(tmp_path), writes=True)
    for step in range(3):
        logger.event("train", loss=1.0, step=step)
        assert [record["step"] for record in events(tmp_path, "train")] == list(range(step + 1))
    logger.close()


def test_tensorboard_has_the_same_values(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = Logger(str(tmp_path), writes=True)
    logger.event("start", step=0)
    for step in (1, 2):
        logger.event("train", loss=0.5 * step, acc1=10.0 * step, lr=0.1, samples=8, step=step)
    logger.event("validate", acc1=55.0, step=2)
    logger.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(board.Tags()["scalars"]) == ["train/acc1", "train/loss", "train/lr", "validate/acc1"]
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == [(1, 0.5), (2, 1.0)]
    assert [(point.step, point.value) for point in board.Scalars("validate/acc1")] == [(2, 55.0)]


def test_a_broken_optional_package_costs_a_warning_and_nothing_else(
    tmp_path: Any, capsys: Any, monkeypatch: Any
) -> None:
    class Broken(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise TypeError("Descriptors cannot be created directly.\nSee protobuf.dev")

    def broken(folder: str) -> None:
        raise ValueError("unknown font")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    monkeypatch.setattr(logger_module, "save_curves", broken)
    logger = Logger(str(tmp_path), writes=True)
    logger.event("start", step=2)
    logger.event("validate", acc1=55.0, step=2)
    logger.curves()
    logger.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("TensorBoard's events are not written (TypeError: Descriptors cannot be created directly.)")
    assert second.endswith("curves.png is not drawn (ValueError: unknown font)")
    assert len(events(tmp_path)) == 2


# --- the progress bar -------------------------------------------------------------------------------------------------


def test_a_progress_bar_on_a_terminal_ends_at_its_total_and_leaves_the_lines_intact(
    monkeypatch: Any, capsys: Any
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with console.progress(20, 0, "Test"):
        bar = console._bar
        for number in range(3):
            console.line(f"line {number}")
            console.advance(8)
        assert bar.n == 20  # the last of the three batches has four images
    assert console._bar is None
    assert capsys.readouterr().out.splitlines() == ["line 0", "line 1", "line 2"]


def test_without_a_terminal_there_is_no_progress_bar(capsys: Any) -> None:
    with console.progress(2, 0, "Checking"):
        console.advance(1)
    assert capsys.readouterr().err == ""


@pytest.fixture
def nothing_lost(monkeypatch: Any) -> None:
    """No line was lost before this test."""
    monkeypatch.setattr(console, "_lost", False)


# --- output that cannot be written ------------------------------------------------------------------------------------


@full_disk
def test_a_full_disk_for_metrics_is_one_warning(tmp_path: Any, capsys: Any, nothing_lost: None) -> None:
    os.symlink("/dev/full", str(tmp_path / "metrics.jsonl"))
    logger = Logger(str(tmp_path), writes=True)
    for step in range(3):
        logger.event("train", loss=1.0, step=step)
    console.line("=> training continues")
    logger.close()
    captured = capsys.readouterr()
    assert captured.out == "=> training continues\n"
    (warning,) = captured.err.splitlines()
    assert warning.endswith("warning: log output is being lost ([Errno 28] No space left on device)")


def test_a_full_disk_for_tensorboard_at_the_end_is_a_warning(tmp_path: Any, capsys: Any, nothing_lost: None) -> None:
    logger = Logger(str(tmp_path), writes=True)
    logger.event("start", step=0)

    class Full:
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    logger.tensorboard = Full()
    logger.close()
    assert capsys.readouterr().err.endswith("log output is being lost ([Errno 28] No space left on device)\n")
