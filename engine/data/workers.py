# SPDX-License-Identifier: BSD-3-Clause
"""The worker processes of a DataLoader: how they start, share memory and end. No other file knows them."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import multiprocessing
import multiprocessing.process
import multiprocessing.queues
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from typing import Any, Iterable, Iterator, NamedTuple, NoReturn

from engine.console import exit_process, remove_at_exit
from engine.errors import EXIT_FAILURE, LoaderWorkerError, UsageError, UserError, first_line
from engine.signals import ignore_stop_signals, sigterm_blocked
from engine.versions import TORCH

import torch
from torch.utils.data import get_worker_info

SOCKET_FOLDER_BYTES = 80  # a socket's path has at most 103 on macOS, 107 on Linux, and its name takes 18
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
_started: list[Any] = []  # the workers of this process; with persistent workers, a second pass keeps the first's


def worker_options(workers: int) -> dict[str, Any]:
    """Return the keyword arguments of a DataLoader of whole batches that concern its workers."""
    options: dict[str, Any] = {
        "num_workers": workers,
        "worker_init_fn": functools.partial(init_worker, os.getpid()),
        "collate_fn": unchanged,
    }
    if workers and sys.platform == "linux":
        # Python 3.14 would start each worker from scratch, with all imports and a copy of the dataset.
        options["multiprocessing_context"] = "fork"
    if workers and TORCH >= (1, 7):
        options["persistent_workers"] = True
    if workers:
        _make_socket_folder()
        with contextlib.suppress(OSError, ValueError):  # each tensor of a batch in flight takes a descriptor
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Of the DataLoader that is made next, about more workers than cores: that is the user's choice.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return options


def _make_socket_folder() -> None:
    """Make the folder of the sockets that workers send batches through, one for all of them, for this process alone.

    multiprocessing's own may have too long a path, or stay behind. Raises UsageError if there is no place for it.
    """
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]  # workers inherit it
    for parent in (None, "/tmp", "/var/tmp", "/dev/shm", os.curdir):
        if "socket folder" in config:
            return
        with contextlib.suppress(OSError):
            folder = os.path.abspath(tempfile.mkdtemp(prefix="pymp-", dir=parent))
            remove_at_exit(folder)
            if len(os.fsencode(folder)) <= SOCKET_FOLDER_BYTES:
                config["tempdir"] = config["socket folder"] = folder
    raise UsageError("no folder with a short path can be written to for the sockets of workers: set TMPDIR to one")


def unchanged(batch: Any) -> Any:
    """A collate_fn for a dataset that gives whole batches."""
    return batch


def read_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Start one pass over a DataLoader, and return its batches.

    A UserError in place of a batch is raised, and so is LoaderWorkerError if a worker has died. The workers start now,
    not at the first batch: that draws from the generator that dropout uses.
    """
    before = multiprocessing.active_children()
    try:
        with sigterm_blocked():  # in all threads of a worker, so that ignore_stop_signals sees who sends it
            batches = iter(loader)
    except OSError as error:
        raise worker_error(error) from error
    # torch raises out of this signal, at any point of the main thread. It also looks while it waits for a batch.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _started.extend(child for child in multiprocessing.active_children() if child not in before)
    reader = _raise_errors(batches)
    try:
        return reader
    finally:
        # signal.signal of Python 3.7 leaves this frame in a reference cycle, so the frame must not hold the workers: if
        # garbage collection ends them, torch 1.5 waits for them forever.
        del batches, reader


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            deadline = time.monotonic() + 1  # a closed socket is perhaps seen before the worker's exit
            codes: list[int] = []
            while _started and not codes and time.monotonic() < deadline:
                codes = [worker.exitcode for worker in _started if worker.exitcode]
                time.sleep(0.05)
            if codes or _lacks_descriptors(error):
                raise worker_error(error, *codes) from error
            raise
        if isinstance(batch, UserError):
            try:
                raise batch
            finally:
                del batch  # the error holds this frame, so the frame must not hold the error
        if isinstance(batch[0], WholeImages):
            batch = (batch[0].by_size(), *batch[1:])
        yield batch


def _lacks_descriptors(error: BaseException) -> bool:
    """Whether an error comes from `ulimit -n`. Only its text says so if torch raises it, or if it is a lost message.

    torch 1.5 does not say why it cannot open shared memory: then the descriptors in use decide.
    """
    text = str(error)
    if text.startswith("unable to open shared memory object") and text.endswith("in read-write mode"):
        return _few_descriptors_left()
    return getattr(error, "errno", None) in NO_DESCRIPTOR or "Too many open files" in text or "items of ancdata" in text


def _few_descriptors_left() -> bool:
    """Whether this process is near its limit; a thread may have closed some since an error."""
    try:
        return len(os.listdir("/dev/fd")) + 4 > resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError as error:  # listing them takes one
        return error.errno in NO_DESCRIPTOR


def worker_error(error: Exception, *codes: int) -> LoaderWorkerError:
    """codes: of the workers that have exited."""
    if _lacks_descriptors(error) or any(code in NO_DESCRIPTOR for code in codes):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return LoaderWorkerError(
            f"DataLoader workers have no file descriptor left, `ulimit -n` is {limit}: raise it to 1024 or more",
            ", or use --workers 0; the last checkpoint is intact",
        )
    return LoaderWorkerError(
        f"a DataLoader worker exited unexpectedly ({first_line(error)}): killed, out of memory, or "
        "/dev/shm is too small (docker run --shm-size=8g)",
        "; --workers 0 needs none; the last checkpoint is intact",
    )


# --- in a worker ------------------------------------------------------------------------------------------------------


def init_worker(parent: int, worker_id: int) -> None:
    """A worker_init_fn: the worker exits silently when its parent dies or terminates it, or if it cannot send."""
    ignore_stop_signals(parent)
    # Of this worker alone. Threads of multiprocessing send a batch and its descriptors. They drop what they cannot
    # send, and the parent would wait for it forever. Other errors come back in place of a batch.
    sys.excepthook = lambda _, error, __: _exit_with(error) if _lacks_descriptors(error) else None
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda error, _: _exit_with(error)
    )


def _exit_with(error: Any) -> NoReturn:
    """Exit with the number of an error, by which worker_error knows it."""
    exit_process(getattr(error, "errno", None) or EXIT_FAILURE)


def in_worker() -> bool:
    return get_worker_info() is not None


class WholeImages(NamedTuple):
    """Images of several sizes in two tensors: each tensor of a batch takes a descriptor of both processes."""

    pixels: torch.Tensor  # uint8, flat: one image after the other, those of a size together
    layout: torch.Tensor  # (n, 3) int64: position in the batch, height and width of each

    def by_size(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return [(positions (n,), images (n, H, W, 3))], views of the pixels."""
        groups, end = [], 0
        for (height, width), rows in itertools.groupby(self.layout.tolist(), lambda row: tuple(row[1:])):
            positions = [position for position, _, _ in rows]
            start, end = end, end + len(positions) * height * width * 3
            groups.append((torch.tensor(positions), self.pixels[start:end].view(-1, height, width, 3)))
        return groups


def share(tensor: torch.Tensor) -> torch.Tensor:
    """In a worker, move a tensor to shared memory. Raises LoaderWorkerError if there is none left.

    DataLoader would do it in a thread whose errors are lost: with /dev/shm full, the run would hang.
    """
    if not in_worker():
        return tensor
    try:
        return tensor.share_memory_()
    except (RuntimeError, OSError) as error:
        raise worker_error(error) from error
