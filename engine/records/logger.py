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
from engine.records.metrics import Totals
from engine.records.run_info import write_text


class ProgressMeter:
    """The parsed log line of a loop: `Epoch: [0][  10/5004]	Time  0.251 ( 0.249)	…`.

    Each field shows the value since the last line and, in parentheses, the mean of the epoch.

    Args:
        prefix: what the line starts with.
        steps: number of steps in the loop.
        done, totals: steps and totals of an earlier run, if it stopped within this epoch.
    """

    def __init__(self, prefix: str, steps: int, done: int = 0, totals: Totals = Totals()) -> None:  # noqa: B008
        self.prefix, self.steps, self.digits = prefix, steps, len(str(steps))
        self.begin = self.last = time.perf_counter()
        self.data_time = self.last_data_time = 0.0  # seconds spent waiting for batches
        self.first_done = self.last_done = done
        self.last_totals = totals

    def add_data_time(self, seconds: float) -> None:
        self.data_time += seconds

    def line(self, done: int, totals: Totals) -> str:
        """Return the line after `done` steps with these totals of the epoch."""
        now = time.perf_counter()
        recent, steps, steps_in_all = totals.since(self.last_totals), done - self.last_done, done - self.first_done
        steps, steps_in_all = max(1, steps), max(1, steps_in_all)
        fields = [
            f"{self.prefix}[{done:{self.digits}d}/{self.steps}]",
            f"Time {(now - self.last) / steps:6.3f} ({(now - self.begin) / steps_in_all:6.3f})",
            f"Data {(self.data_time - self.last_data_time) / steps:6.3f} ({self.data_time / steps_in_all:6.3f})",
            f"Loss {recent.loss:6.4f} ({totals.loss:6.4f})",
            f"Acc@1 {recent.acc1:6.2f} ({totals.acc1:6.2f})",
            f"Acc@5 {recent.acc5:6.2f} ({totals.acc5:6.2f})",
        ]
        self.last, self.last_data_time, self.last_done, self.last_totals = now, self.data_time, done, totals
        return "\t".join(fields)


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
        """Open metrics.jsonl, and TensorBoard's file if it is installed. Raises UsageError."""
        if self.jsonl is not None or not self.writes:
            return
        path = os.path.join(self.folder, "metrics.jsonl")
        try:
            self.jsonl = open(path, "a")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        with _optional("TensorBoard's events are not written"):  # metrics.jsonl has the same values
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(os.path.join(self.folder, "tensorboard"))
            if hasattr(threading, "excepthook"):  # since Python 3.8
                threading.excepthook = _warn_of_thread_error  # TensorBoard writes in a thread of its own

    def event(self, event: str, **fields: Any) -> None:
        """Write a line of metrics.jsonl. event: start, train, epoch, validate, checkpoint, stop or done.

        Raises UsageError if the file cannot be opened.
        """
        self.open()
        if self.jsonl is None:
            return
        record: dict[str, Any] = {"event": event}
        for key, value in fields.items():
            record[key] = None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN
        with console.warn_once():
            self.jsonl.write(json.dumps(record) + "\n")
            self.jsonl.flush()
        if self.tensorboard is not None and "step" in fields:
            with console.warn_once():
                for key in ("loss", "acc1", "acc5", "lr", "images_per_second"):
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
def _optional(loss: str) -> Iterator[None]:
    """A package that is missing is left out; one that is broken costs a warning, not the training."""
    try:
        yield
    except ImportError:
        pass
    except Exception as error:
        console.warning(f"{loss} ({type(error).__name__}: {first_line(error)})")


def _warn_of_thread_error(failure: Any) -> None:
    if isinstance(failure.exc_value, OSError):
        with console.warn_once():
            raise failure.exc_value
    else:
        threading.__excepthook__(failure)  # type: ignore[attr-defined]
