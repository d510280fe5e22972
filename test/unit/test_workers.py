# SPDX-License-Identifier: BSD-3-Clause
"""A lost DataLoader worker is an error of one line. test/run has tests with worker processes."""

from __future__ import annotations

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
    with pytest.raises(LoaderWorkerError, match="a DataLoader worker exited unexpectedly"):
        next(read_batches(failing(error)))


def test_other_errors_stay_what_they_are(monkeypatch: Any) -> None:
    monkeypatch.setattr(workers, "_started", [SimpleNamespace(exitcode=0), SimpleNamespace(exitcode=None)])
    with pytest.raises(RuntimeError, match="out of memory"):
        next(read_batches(failing(RuntimeError("out of memory"))))
