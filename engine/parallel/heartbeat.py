# SPDX-License-Identifier: BSD-3-Clause
"""Detects lost processes: exits this process within a minute if another one exits, stalls or is disconnected."""

from __future__ import annotations

import math
import threading
import time
from typing import Any, Callable

from engine.console import exit_process
from engine.errors import EXIT_FAILURE


def beats(store: Any, rank: int, new: int = 0) -> int:
    """Return how many beats of a rank the job's store has counted, after `new` more."""
    return store.add(f"beat/{rank}", new)


class Heartbeat:
    """A thread that counts a beat in the job's key-value store, and reads those of the others.

    A slow step, a compilation or an index scan does not hold the thread up, so none is mistaken for a lost process. Nor
    is a job that was suspended and continues: the clock stands still while this process does.
    Rank 0 watches all beats and publishes which rank is unreachable; the others watch that and rank 0. A second thread
    watches the first, which hangs if the node of the store (rank 0) is lost.

    store: a connection of its own. report(text, rank): called with the one line that says which rank is unreachable.
    before_exit: called before this process exits for that.
    """

    INTERVAL, PATIENCE, PATIENCE_IN_DOUBT = 3, 30, 9  # seconds

    def __init__(self, store: Any, rank: int, world_size: int, report: Callable[..., None]) -> None:
        self.store, self.rank, self.world_size, self.report = store, rank, world_size, report
        self.before_exit: Callable[[], None] = lambda: None
        self.answers = 0  # of the store
        self.in_doubt = False  # whether an error of this process may come from a lost peer
        self.failed = False  # whether this process itself has failed
        self.stopped, self.urgent, self.all_alive = threading.Event(), threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch_store)]
        for thread in self.threads:
            thread.start()

    def await_verdict(self) -> None:
        """After an error that may come from a broken connection: end this process if a rank is unreachable.

        Returns as soon as every other rank has beaten once more: after three seconds, not more.
        """
        self.in_doubt = True
        self.urgent.set()
        self.all_alive.wait(timeout=self.PATIENCE + 10)

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
        clock, last, doubt = 0.0, time.monotonic(), math.inf  # doubt: when it began
        try:
            while not self.stopped.is_set():
                now = time.monotonic()
                clock, last = clock + min(now - last, 2 * self.INTERVAL), now
                if self.failed:
                    self._publish(self.rank)
                    return
                in_doubt = self.in_doubt
                beats(self.store, self.rank, 1)
                self._watch(seen, clock, everyone=in_doubt or self.rank == 0, patient=not in_doubt)
                unreachable = self.store.add("missing", 0)  # rank + 1; 0 if there is none
                if unreachable:
                    self.stopped.wait(2)  # this process may be about to find the same error itself
                    self._end(unreachable - 1)
                self.answers += 1
                if in_doubt and all(changed > doubt for _, changed in seen.values()):
                    self.all_alive.set()
                elif in_doubt:  # a beat sent before the error may still arrive
                    doubt = min(doubt, clock + 0.5)
                if self.urgent.wait(self.INTERVAL):
                    self.stopped.wait(0.2)
        except RuntimeError:  # the store is gone, and rank 0 with it: after the job's end, or before it
            self.stopped.wait(self.INTERVAL)
            self._end(0)

    def _watch(self, seen: dict[int, tuple[int, float]], now: float, *, everyone: bool, patient: bool) -> None:
        """Read the beats of the others, or of rank 0 alone; end this process if one has been silent for too long."""
        for other in range(self.world_size) if everyone else [0]:
            count = beats(self.store, other)
            if other not in seen or seen[other][0] != count:
                seen[other] = count, now
            elif now - seen[other][1] > (self.PATIENCE if patient else self.PATIENCE_IN_DOUBT):
                self._publish(other)
                if self.rank == 0:  # this process may hold the store: the others read it first
                    self.stopped.wait(2 * self.INTERVAL)
                self._end(other)

    def _publish(self, rank: int) -> None:
        if self.store.add("claims", 1) == 1:  # publish only the first failure: it is the cause
            self.store.add("missing", rank + 1)

    def _watch_store(self) -> None:
        silent = answers = 0  # silent: intervals without an answer
        while silent < self.PATIENCE / self.INTERVAL + 2:
            if self.stopped.wait(self.INTERVAL):
                return
            silent, answers = silent + 1 if self.answers == answers else 0, self.answers
        self._end(0)

    def _end(self, rank: int) -> None:
        if not self.stopped.is_set() and not self.failed:
            try:
                self.report(
                    f"rank {rank} is unreachable (exited, suspended or disconnected), so rank {self.rank} exits; the "
                    "last checkpoint is intact",
                    rank,
                )
                self.before_exit()
            finally:
                exit_process(EXIT_FAILURE)
