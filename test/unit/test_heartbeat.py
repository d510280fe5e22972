# SPDX-License-Identifier: BSD-3-Clause
"""Whether an error comes from a lost peer: the others' beats say so."""

from __future__ import annotations

import threading
import time
from typing import Any

from engine.parallel import heartbeat
from engine.parallel.heartbeat import Heartbeat

import pytest


class Store:
    """A key-value store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.lock = threading.Lock()

    def add(self, key: str, value: int) -> int:
        with self.lock:
            self.values[key] = self.values.get(key, 0) + value
            return self.values[key]


class Job:
    """Processes as threads of this one. Their beats come every 0.3 s."""

    def __init__(self, monkeypatch: Any, world_size: int) -> None:
        self.ended: list[int] = []  # the ranks that were found lost, each once for each process that ends for it
        monkeypatch.setattr(heartbeat, "exit_process", lambda code: self.ended.append(-code) or time.sleep(60))
        for name, seconds in (("INTERVAL", 0.3), ("PATIENCE", 20), ("PATIENCE_IN_DOUBT", 1.5)):
            monkeypatch.setattr(Heartbeat, name, seconds)
        store = Store()
        self.store = store
        self.beats = [Heartbeat(store, rank, world_size, self.report) for rank in range(world_size)]

    def report(self, text: str, rank: int) -> None:
        self.ended.append(rank)


@pytest.fixture
def job(monkeypatch):
    job = Job(monkeypatch, 3)
    yield job
    for beat in job.beats:
        beat.stopped.set()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_local_as_soon_as_all_others_have_beaten_once_more(job, rank, monkeypatch):
    monkeypatch.setattr(Heartbeat, "PATIENCE_IN_DOUBT", 15)  # it does not wait for so long, however slow the machine
    time.sleep(0.5)
    begin = time.monotonic()
    job.beats[rank].await_verdict()
    assert time.monotonic() - begin < 10 and job.ended == []
    job.beats[rank].announce_failure()
    assert job.store.add("missing", 0) == rank + 1


@pytest.mark.parametrize("rank, lost", [(0, 2), (1, 2)])
def test_an_error_whose_peer_no_longer_beats_is_a_lost_peer(job, rank, lost):
    job.beats[lost].stopped.set()
    time.sleep(0.5)
    verdict = threading.Thread(target=job.beats[rank].await_verdict, daemon=True)
    verdict.start()
    time.sleep(1)
    assert verdict.is_alive() and job.ended == []
    deadline = time.monotonic() + 10
    while lost not in job.ended:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert verdict.is_alive() and job.store.add("missing", 0) == lost + 1


def test_a_job_that_was_suspended_and_continues_is_not_lost_but_a_process_that_stays_behind_is(job, monkeypatch):
    """SIGSTOP or a suspended node: all clocks jump, and nobody has beaten in the meantime."""
    monotonic, jump = time.monotonic, [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: monotonic() + jump[0])
    for seconds in (25, 100, 10000):
        time.sleep(0.5)
        jump[0] += seconds
        time.sleep(1)
        assert job.ended == []
    monkeypatch.setattr(Heartbeat, "PATIENCE", 1.5)
    job.beats[2].stopped.set()
    deadline = monotonic() + 20
    while 2 not in job.ended:
        assert monotonic() < deadline
        time.sleep(0.1)
