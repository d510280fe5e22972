# SPDX-License-Identifier: BSD-3-Clause
"""A lost DataLoader worker is an error of one line. test/run has tests with worker processes."""

from __future__ import annotations

import errno
import os
import sys
from types import SimpleNamespace
from typing import Any, Iterator

from engine.data import read_batches, workers
from engine.errors import LoaderWorkerError

import pytest


def failing(error: Exception) -> Iterator[Any]:
    """A DataLoader that raises an error for its first batch."""
    raise error
    yield


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_lost_worker_raises_is_an_error_of_one_line(monkeypatch: Any, error: Exception) -> None:
    """How torch notices a dead worker depends on what it was waiting for: its exit, its socket or its pipe."""
    monkeypatch.setattr(workers, "_started", [SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=-9)])
    with pytest.raises(LoaderWorkerError, match="a DataLoader worker exited unexpectedly.*--workers 0") as raised:
        next(read_batches(failing(error)))
    assert "--workers" not in raised.value.args[0]  # predict.py has no such flag


def test_other_errors_stay_what_they_are(monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "_started", [SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=None)])
    with pytest.raises(RuntimeError, match="out of memory"):
        next(read_batches(failing(RuntimeError("out of memory"))))


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files"),  # a pipe, a lock
        OSError(23, "Too many open files in system"),
        RuntimeError("received 0 items of ancdata"),  # a message without its descriptors
        RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"),
    ],
    ids=lambda error: str(error)[:20],
)
@pytest.mark.parametrize("place", ["start", "batch"])
def test_a_lack_of_descriptors_names_ulimit(error: Exception, place: str) -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            raise error

    if place == "start" and not isinstance(error, OSError):
        pytest.skip("only system calls fail at the start")
    with pytest.raises(LoaderWorkerError, match="ulimit -n"):
        next(read_batches(Failing() if place == "start" else failing(error)))


@pytest.mark.parametrize("left, cause", [(0, "ulimit -n"), (2, "ulimit -n"), (50, "/dev/shm"), (10_000, "/dev/shm")])
def test_without_a_reason_the_descriptors_that_are_left_decide(monkeypatch: Any, left: int, cause: str) -> None:
    """torch 1.5 gives none."""
    limit = len(os.listdir("/dev/fd")) + left
    monkeypatch.setattr(workers.resource, "getrlimit", lambda _: (limit, limit))
    error = RuntimeError("unable to open shared memory object </torch_1_2> in read-write mode")
    assert cause in str(workers.worker_error(error))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_a_worker_tells_by_its_exit_code_that_it_has_no_descriptor(monkeypatch: Any, code: int) -> None:
    monkeypatch.setattr(workers, "_started", [SimpleNamespace(exitcode=None), SimpleNamespace(exitcode=code)])
    with pytest.raises(LoaderWorkerError, match="ulimit -n"):
        next(read_batches(failing(EOFError())))
    with pytest.raises(SystemExit) as caught:
        monkeypatch.setattr(workers, "exit_process", sys.exit)
        workers._exit_with(OSError(code, "no descriptor"))
    assert caught.value.code == code
