# SPDX-License-Identifier: BSD-3-Clause
"""Detects lost processes: exits this process within a minute if another one exits, stalls or is disconnected."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Callable

from engine.console import exit_process
from engine.errors import EXIT_FAILURE

import torch.distributed as dist


class Heartbeat:
    """A thread that counts a beat in the job's key-value store, and reads those of the others.

    A slow step, a compilation or an index scan does not hold the thread up, so none is mistaken for a lost process.
    Rank 0 watches all beats and publishes which rank is unreachable; the others watch that and rank 0. A second thread
    watches the first, which hangs if the node of the store (rank 0) is lost.

    Args:
        host, port: the store.
        job: separates this job's keys from those of an earlier attempt in the same store (torchrun restarts).
        report: called with the one line that says which rank is unreachable.

    Attributes:
        before_exit: called before this process exits because another is unreachable.
    """

    INTERVAL, PATIENCE = 3, 30  # seconds
    CONNECT_SECONDS = 45

    def __init__(
        self, host: str, port: int, rank: int, world_size: int, job: str, report: Callable[[str], None]
    ) -> None:
        # A connection of its own: an operation that waits holds up all others on the same connection.
        timeout = datetime.timedelta(seconds=self.CONNECT_SECONDS)
        self.store = dist.PrefixStore(job, dist.TCPStore(host, port, 1, False, timeout))
        self.rank, self.world_size, self.report = rank, world_size, report
        self.before_exit: Callable[[], None] = lambda: None
        self.patience = self.PATIENCE
        self.last_answer = time.monotonic()  # of the store
        self.failed = False  # whether this process itself has failed
        self.stopped, self.urgent = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()

    def await_verdict(self) -> None:
        """After an error that may come from a broken connection: end this process if a rank is unreachable.

        Returns if all ranks still beat after 40 s.
        """
        self.patience = 3 * self.INTERVAL
        self.urgent.set()
        self.threads[0].join(timeout=self.PATIENCE + 10)

    def announce_failure(self) -> None:
        """Tell the others now that this process has failed, instead of letting the heartbeat time out."""
        self.failed = True
        self.urgent.set()
        self.threads[0].join(timeout=1)

    def stop(self) -> None:
        """Stop at the end of a job. Waits for the threads: one inside the store at Python's exit would abort."""
        self.stopped.set()
        self.urgent.set()
        for thread in self.threads:
            thread.join(timeout=5)

    def _beat(self) -> None:
        seen: dict[int, tuple[int, float]] = {}  # rank -> (its count of beats, when that changed)
        try:
            while not self.stopped.is_set():
                if self.failed:
                    self._publish(self.rank)
                    return
                self.store.add(f"beat/{self.rank}", 1)
                for other in range(1, self.world_size) if self.rank == 0 else [0]:
                    count = self.store.add(f"beat/{other}", 0)
                    if other not in seen or seen[other][0] != count:
                        seen[other] = count, time.monotonic()
                    elif time.monotonic() - seen[other][1] > self.patience:
                        self._publish(other)
                        # This process may hold the store: the others read it first.
                        self.stopped.wait(2 * self.INTERVAL)
                        self._end(other)
                unreachable = self.store.add("missing", 0)  # rank + 1; 0 if there is none
                if unreachable:
                    self.stopped.wait(2)  # this process may be about to find the same error itself
                    self._end(unreachable - 1)
                self.last_answer = time.monotonic()
                if self.urgent.wait(self.INTERVAL):
                    self.stopped.wait(0.2)
        except RuntimeError:  # the store is gone, and rank 0 with it: after the job's end, or before it
            self.stopped.wait(self.INTERVAL)
            self._end(0)

    def _publish(self, rank: int) -> None:
        if self.store.add("claims", 1) == 1:  # publish only the first failure: it is the cause
            self.store.add("missing", rank + 1)

    def _watch_store(self) -> None:
        while time.monotonic() - self.last_answer < self.PATIENCE + 5 * self.INTERVAL:
            if self.stopped.wait(self.INTERVAL):
                return
        self._end(0)

    def _end(self, rank: int) -> None:
        if not self.stopped.is_set() and not self.failed:
            try:
                self.report(
                    f"rank {rank} is unreachable (exited, suspended or disconnected), so rank {self.rank} exits; the "
                    "last checkpoint is intact"
                )
                self.before_exit()
            finally:
                exit_process(EXIT_FAILURE)
