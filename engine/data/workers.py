# SPDX-License-Identifier: BSD-3-Clause
"""The worker processes of a DataLoader: how they start, share memory and end. No other file knows them."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
import time
import warnings
from typing import Any, Iterable, Iterator

from engine.console import exit_process
from engine.errors import EXIT_FAILURE, LoaderWorkerError, UserError, first_line
from engine.signals import ignore_stop_signals, sigterm_blocked
from engine.versions import TORCH

import torch
from torch.utils.data import get_worker_info

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
    # Of the DataLoader that is made next, about more workers than cores: that is the user's choice.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    return options


def unchanged(batch: Any) -> Any:
    """A collate_fn for a dataset that gives whole batches."""
    return batch


def read_batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Start one pass over a DataLoader, and return its batches.

    A UserError in place of a batch is raised, and so is LoaderWorkerError if a worker has died. The workers start now,
    not at the first batch: that draws from the generator that dropout uses.
    """
    before = multiprocessing.active_children()
    with sigterm_blocked():  # in all threads of a worker, so that ignore_stop_signals sees who sends it
        batches = iter(loader)
    # torch raises out of this signal, at any point of the main thread. It also looks while it waits for a batch.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _started.extend(child for child in multiprocessing.active_children() if child not in before)
    return _raise_errors(batches)


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            deadline = time.monotonic() + 1  # a closed socket is perhaps seen before the worker's exit
            while _started and time.monotonic() < deadline:
                if any(worker.exitcode not in (None, 0) for worker in _started):
                    raise worker_error(error) from error
                time.sleep(0.05)
            raise
        if isinstance(batch, UserError):
            raise batch
        yield batch


def worker_error(error: Exception) -> LoaderWorkerError:
    return LoaderWorkerError(
        f"a DataLoader worker exited unexpectedly ({first_line(error)}): killed, out of memory, or "
        "/dev/shm is too small (docker run --shm-size=8g; --workers 0 needs none); the last checkpoint is intact"
    )


# --- in a worker ------------------------------------------------------------------------------------------------------


def init_worker(parent: int, worker_id: int) -> None:
    """A worker_init_fn: the worker exits silently when its parent dies or terminates it, or if it cannot send."""
    ignore_stop_signals(parent)
    # Of this worker alone. Errors come back in place of a batch; only a thread of multiprocessing could still print.
    sys.excepthook = lambda *_: None
    # That thread drops a batch that it cannot send (no descriptor is left), and the parent would wait for it forever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(  # type: ignore[attr-defined]
        lambda *_: exit_process(EXIT_FAILURE)
    )


def in_worker() -> bool:
    return get_worker_info() is not None


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
