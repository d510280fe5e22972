# SPDX-License-Identifier: BSD-3-Clause
"""The parsed log lines, metrics.jsonl, TensorBoard's events and curves.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from typing import IO, Any, Iterator

from engine import console
from engine.errors import UsageError, first_line
from engine.records.curves import save_curves
from engine.records.metrics import AccuracyCounter, Snapshot, Totals, read_snapshots
from engine.records.run_info import write_text


class ProgressMeter:
    """Prints the parsed log lines of a loop: `Epoch: [0][  10/5004]	Time  0.251 ( 0.249)	…`.

    Each field shows the value since the last line and, in parentheses, the mean of the epoch. A reading of the values
    is a synchronization, so lines may wait for the next reading; they share its Time and Data.

    Args:
        prefix: what the line starts with.
        steps: number of steps in the loop.
        print_freq: steps between lines; the first and the last step have one, too.
        wait: seconds between readings; the first and the last line do not wait.
        done, totals: steps and totals of an earlier run, if it stopped within this epoch.
        has_data: whether lines have the field Data.
    """

    def __init__(
        self,
        prefix: str,
        steps: int,
        print_freq: int = 1,
        wait: float = 0.0,
        done: int = 0,
        totals: Totals = Totals(),  # noqa: B008
        *,
        has_data: bool = True,
    ) -> None:
        self.prefix, self.steps, self.digits = prefix, steps, len(str(steps))
        self.print_freq, self.wait, self.has_data = print_freq, wait, has_data
        self.begin = self.last = time.perf_counter()
        self.data_time = self.last_data_time = 0.0  # seconds spent waiting for batches
        self.first_done = self.last_done = done
        self.last_totals = totals
        self.waiting: list[tuple[int, Snapshot]] = []

    def add_data_time(self, seconds: float) -> None:
        self.data_time += seconds

    def step(self, done: int, counter: AccuracyCounter, *, stopping: bool = False) -> Totals | None:
        """Print what is due after `done` steps. Returns the totals if they were read: a synchronization."""
        at_once = stopping or done in (1, self.steps)
        if not at_once and done % self.print_freq:
            return None
        self.waiting.append((done, counter.snapshot()))
        if not at_once and time.perf_counter() - self.last < self.wait:
            return None
        values = read_snapshots([snapshot for _, snapshot in self.waiting])
        now = time.perf_counter()
        steps, steps_in_all = max(1, done - self.last_done), max(1, done - self.first_done)
        times = [f"Time {(now - self.last) / steps:6.3f} ({(now - self.begin) / steps_in_all:6.3f})"]
        if self.has_data:
            data_time = self.data_time - self.last_data_time
            times.append(f"Data {data_time / steps:6.3f} ({self.data_time / steps_in_all:6.3f})")
        for (line_done, _), (totals, loss) in zip(self.waiting, values):
            recent, self.last_totals = totals.since(self.last_totals), totals
            fields = [
                f"{self.prefix}[{line_done:{self.digits}d}/{self.steps}]",
                *times,
                f"Loss {loss:6.8f} ({totals.loss:6.8f})",
                f"Acc@1 {recent.acc1:6.2f} ({totals.acc1:6.2f})",
                f"Acc@5 {recent.acc5:6.2f} ({totals.acc5:6.2f})",
            ]
            console.line("\t".join(fields))
        self.last, self.last_data_time, self.last_done, self.waiting = now, self.data_time, done, []
        return self.last_totals


class Logger:
    """Writes metrics.jsonl, TensorBoard's events and curves.png, from the first event on; nothing unless on rank 0.

    Args:
        folder: where the files go.
        writes: whether this is rank 0.
    """

    def __init__(self, folder: str = ".", *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.tensorboard: Any = None
        self.jsonl: IO[str] | None = None

    def open(self) -> None:
        """Open metrics.jsonl. Raises UsageError."""
        if self.jsonl is not None or not self.writes:
            return
        path = os.path.join(self.folder, "metrics.jsonl")
        try:
            self.jsonl = open(path, "a")  # noqa: SIM115  closed by close()
            with open(path, "rb") as file:
                file.seek(max(0, os.path.getsize(path) - 1))
                if file.read(1) not in (b"", b"\n"):  # half a line: the power failed
                    self.jsonl.write("\n")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error

    def _open_tensorboard(self) -> None:
        """Open TensorBoard's file if it is installed."""
        with _optional("TensorBoard's events are not written"):  # metrics.jsonl has the same values
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(os.path.join(self.folder, "tensorboard"))
            if hasattr(threading, "excepthook"):  # since Python 3.8
                threading.excepthook = _warn_of_thread_error  # TensorBoard writes in a thread of its own

    def event(self, event: str, **fields: Any) -> None:
        """Write a line of metrics.jsonl. event: start, train, epoch, validate, checkpoint, stop or done.

        `start` begins a training, which has TensorBoard's events too. Raises UsageError if the file cannot be opened.
        """
        self.open()
        if self.jsonl is None:
            return
        if event == "start":
            self._open_tensorboard()
        record: dict[str, Any] = {"event": event}
        for key, value in fields.items():
            record[key] = None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN
        with console.warn_once():
            self.jsonl.write(json.dumps(record) + "\n")
            self.jsonl.flush()
        if self.tensorboard is not None and "step" in fields:
            with console.warn_once():
                for key in ("loss", "acc1", "acc5", "macro_f1", "balanced_acc", "lr", "images_per_second"):
                    if key in fields:
                        self.tensorboard.add_scalar(f"{event}/{key}", fields[key], fields["step"])

    def write_args(self, record: dict[str, Any]) -> None:
        """Write args.json on rank 0. Raises UsageError if it cannot be written."""
        if self.writes:
            write_text(os.path.join(self.folder, "args.json"), json.dumps(record, indent=2, sort_keys=True) + "\n")

    def curves(self) -> None:
        """Draw curves.png from metrics.jsonl if matplotlib is installed."""
        if self.writes:
            with _optional("curves.png is not drawn"), console.warn_once():
                save_curves(self.folder)

    def close(self) -> None:
        for file in (self.jsonl, self.tensorboard):
            if file is not None:
                with console.warn_once():
                    file.close()


@contextlib.contextmanager
def _optional(consequence: str) -> Iterator[None]:
    """A package that is missing is left out; one that is broken costs a warning, not the training."""
    try:
        yield
    except ImportError:
        pass
    except Exception as error:
        console.warning(f"{consequence} ({type(error).__name__}: {first_line(error)})")


def _warn_of_thread_error(failure: Any) -> None:
    if isinstance(failure.exc_value, OSError):
        with console.warn_once():
            raise failure.exc_value
    else:
        threading.__excepthook__(failure)  # type: ignore[attr-defined]
