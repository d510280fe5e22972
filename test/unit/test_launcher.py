# SPDX-License-Identifier: BSD-3-Clause
"""What the launcher makes of the ends of its processes. Real ones start in test/run/test_processes.py."""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Any

from engine.parallel import launcher
from engine.parallel.launcher import Outcome, Report, exit_code

import pytest

NONE = Report()
PEER = Report("rendezvous failed", is_user_error=True, about_peers=True)
LOST = Report("rank 1 is unreachable", about_peers=True, lost=1)
USER = Report("no such folder", is_user_error=True)
CRASH = Report("Traceback …\nValueError: x")
KILLED = Report("the process of rank 1 was killed by signal 9")


@pytest.mark.parametrize(
    "ends, code, text",
    [
        # Rank 0 stops on the signal while rank 1 waits for it: rank 1's failure is only a consequence.
        ([(75, NONE), (2, PEER)], 75, ""),
        ([(2, PEER), (75, NONE)], 75, "a process was stopped by a signal; there was nothing to save"),
        ([(2, PEER), (2, PEER)], 2, PEER.text),
        ([(1, CRASH), (2, USER)], 2, USER.text),
        ([(1, CRASH), (2, PEER)], 1, CRASH.text),
        ([(2, PEER), (1, CRASH)], 1, CRASH.text),
        ([(75, NONE), (2, USER)], 2, USER.text),
        # A process that has stopped does not hide the failure of another.
        ([(75, NONE), (1, CRASH)], 1, CRASH.text),
        ([(75, NONE), (137, KILLED)], 137, KILLED.text),
        ([(0, NONE), (0, NONE)], 0, ""),
        ([(75, NONE), (75, NONE)], 75, ""),
        ([(143, NONE), (0, NONE)], 143, ""),  # a second signal
        ([(1, LOST), (137, KILLED)], 137, KILLED.text),
        ([(137, KILLED), (1, CRASH)], 137, KILLED.text),
        ([(1, CRASH), (137, KILLED)], 1, CRASH.text),
        # The last one was killed by the launcher.
        ([(1, LOST), (1, NONE)], 1, LOST.text),
        ([(75, NONE), (1, NONE)], 75, ""),
    ],
)
def test_the_cause_of_a_failure_is_reported_and_not_its_consequences(ends, code, text):
    outcomes = [Outcome(rank, *end) for rank, end in enumerate(ends)]
    assert exit_code(outcomes) == (code, text)


class Child:
    """A child that ends with a code and a report; or one that ends only if it is killed (no code)."""

    def __init__(self, exitcode: int | None = None, report: Report = NONE) -> None:
        self.exitcode: Any = exitcode
        self.sentinel, self.write = os.pipe()
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        if report != NONE:
            sender.send(report)
        sender.close()
        if exitcode is not None:
            os.close(self.write)  # its sentinel is ready

    def join(self) -> None:
        pass

    def kill(self) -> None:
        self.exitcode = -9
        os.close(self.write)


def wait_for(*children: Child) -> tuple[list[Outcome], float]:
    begin = time.monotonic()
    outcomes = launcher._wait_for(children, [child.receiver for child in children], 4)
    return outcomes, time.monotonic() - begin


def test_the_ends_of_the_processes_are_collected(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    outcomes, seconds = wait_for(Child(0), Child(2, USER), Child())
    assert outcomes == [Outcome(4, 0), Outcome(5, 2, USER), Outcome(6, 1)] and 0.5 <= seconds < 5
    outcomes, _ = wait_for(Child(-11), Child(0))
    assert outcomes == [Outcome(4, 139, Report("the process of rank 4 was killed by signal 11")), Outcome(5, 0)]


def test_a_lost_process_is_killed_soon_and_one_that_may_be_saving_is_not(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 2)
    monkeypatch.setattr(launcher, "LOST_SECONDS", 0.2)
    report = Report("rank 5 is unreachable", about_peers=True, lost=5)
    outcomes, seconds = wait_for(Child(1, report), Child())
    assert outcomes == [Outcome(4, 1, report), Outcome(5, 1)] and seconds < 1.5
    outcomes, seconds = wait_for(Child(), Child(), Child(1, report))  # rank 4 may be saving
    assert [outcome.rank for outcome in outcomes] == [6, 5, 4] and seconds >= 2
    outcomes, seconds = wait_for(Child(1, report._replace(lost=0)), Child())  # rank 0 is on another node
    assert seconds >= 2
