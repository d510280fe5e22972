# SPDX-License-Identifier: BSD-3-Clause
"""Log lines, progress bar, metrics.jsonl, TensorBoard and curves.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from typing import IO, Any, Iterable, Iterator

from engine.errors import UsageError, first_line, print_message
from engine.records.curves import save_curves
from engine.records.metrics import Totals


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
    """Prints on the local main process of each node; writes files on rank 0 alone, from the first event on.

    Args:
        folder: where metrics.jsonl, curves.png and TensorBoard's events go.
        prints: whether this is the local main process.
        writes: whether this is rank 0.
    """

    def __init__(self, folder: str = ".", *, prints: bool, writes: bool) -> None:
        self.folder, self.prints, self.writes = folder, prints, writes
        self.bar: Any = None
        self.tensorboard: Any = None
        self.jsonl: IO[str] | None = None
        self.warned = False

    def open(self) -> None:
        """Open metrics.jsonl, and TensorBoard's file if it is installed. Raises UsageError."""
        if self.jsonl is not None or not self.writes:
            return
        path = os.path.join(self.folder, "metrics.jsonl")
        try:
            self.jsonl = open(path, "a")  # noqa: SIM115  closed by close()
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error
        with self._optional("TensorBoard's events are not written"):  # metrics.jsonl has the same values
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(os.path.join(self.folder, "tensorboard"))
            if hasattr(threading, "excepthook"):  # since Python 3.8
                threading.excepthook = self._warn_of_thread_error  # TensorBoard writes in a thread of its own

    def line(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.prints:
            with self._ignoring_write_errors():
                self.result(text)

    def result(self, text: str) -> None:
        """Print output that the user asked for. Raises OSError if it is lost."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def warning(self, text: str) -> None:
        print_message("warning", text)

    @contextlib.contextmanager
    def _ignoring_write_errors(self) -> Iterator[None]:
        """A full disk, or a reader of our output that is gone (`| tee` at Ctrl-C), must not end the training."""
        try:
            yield
        except OSError as error:
            self._warn_of_lost_output(error)

    @contextlib.contextmanager
    def _optional(self, loss: str) -> Iterator[None]:
        """A package that is missing is left out; one that is broken costs a warning, not the training."""
        try:
            yield
        except ImportError:
            pass
        except Exception as error:
            self.warning(f"{loss} ({type(error).__name__}: {first_line(error)})")

    def _warn_of_lost_output(self, error: OSError) -> None:
        if not self.warned:
            self.warned = True
            with contextlib.suppress(OSError):
                self.warning(f"log output is being lost ({error})")

    def _warn_of_thread_error(self, failure: Any) -> None:
        if isinstance(failure.exc_value, OSError):
            self._warn_of_lost_output(failure.exc_value)
        else:
            threading.__excepthook__(failure)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def progress(self, total: int, done: int, label: str) -> Iterator[None]:
        """Show a bar with ETA and images/s on a terminal if tqdm is installed. total, done: images of all processes."""
        if self.prints and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, initial=done, desc=label, unit=" images", leave=False, dynamic_ncols=True)
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def advance(self, images: int) -> None:
        """Move the progress bar."""
        if self.bar is not None:
            self.bar.update(min(images, self.bar.total - self.bar.n))  # the last validation batch is a smaller one

    def track_check(self, reasons: Iterable[str | None], count: int) -> Iterator[str | None]:
        """Pass the results of checking `count` images on, with a progress bar (a Check of folder_index.py)."""
        self.line(f"=> checking {count:,} images, once")
        with self.progress(count, 0, "Checking"):
            for reason in reasons:
                self.advance(1)
                yield reason

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
        with self._ignoring_write_errors():
            self.jsonl.write(json.dumps(record) + "\n")
            self.jsonl.flush()
        if self.tensorboard is not None and "step" in fields:
            with self._ignoring_write_errors():
                for key in ("loss", "acc1", "acc5", "lr", "images_per_second"):
                    if key in fields:
                        self.tensorboard.add_scalar(f"{event}/{key}", fields[key], fields["step"])

    def curves(self) -> None:
        """Draw curves.png from metrics.jsonl if matplotlib is installed."""
        if self.writes:
            with self._optional("curves.png is not drawn"), self._ignoring_write_errors():
                save_curves(self.folder)

    def close(self) -> None:
        for file in (self.jsonl, self.tensorboard):
            if file is not None:
                with self._ignoring_write_errors():
                    file.close()
