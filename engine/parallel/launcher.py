# SPDX-License-Identifier: BSD-3-Clause
"""Starts one process per device, and makes one exit code and one message of their ends.

torchrun and Slurm start the processes themselves.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from typing import Any, Callable, NamedTuple, Sequence

from engine import console
from engine.errors import EXIT_FAILURE, EXIT_STOPPED, RendezvousError, UserError
from engine.parallel.topology import Ranks, Topology, under_torchrun
from engine.signals import STOP_SIGNALS, die_with_parent

GRACE_SECONDS = 30  # before the others are killed, once one process has failed or stopped: they may be saving
LOST_SECONDS = 5  # before a process is killed that others have waited for in vain: it is suspended, or about to exit

Worker = Callable[[Ranks, Callable[..., None]], int]


def launch(worker: Worker, topology: Topology) -> int:
    """Run worker(ranks, report) in every process of this node; return the exit code. Raises what worker raises.

    report(text, rank): how the worker says in one line that another rank is unreachable.
    """
    if topology.spawn:
        return _spawn(worker, topology)
    if under_torchrun():
        die_with_parent(os.getppid())
    return _run(worker, topology.ranks(), lambda text, _: console.error(text))


def _run(worker: Worker, ranks: Ranks, report: Callable[..., None]) -> int:
    # RANK, WORLD_SIZE, …, as under torchrun, for libraries: the program itself reads `ranks`.
    os.environ.update({name.upper(): str(value) for name, value in ranks._asdict().items()})
    if ranks.local_rank != 0:
        console.be_quiet()
    return worker(ranks, report)


class Report(NamedTuple):
    """Why a process has failed."""

    text: str = ""  # one line, or a traceback
    is_user_error: bool = False
    about_peers: bool = False  # it reports a lost peer: a consequence, not the cause
    lost: int | None = None  # the rank of that peer, if it is known


class Outcome(NamedTuple):
    """How a process has ended."""

    rank: int
    code: int
    report: Report = Report()


def _spawn(worker: Worker, topology: Topology) -> int:
    """Start one process per device, wait for all of them, and return the job's exit code; its error is printed once.

    Stop signals are passed on to the processes. None of them outlives this one.
    """
    context = multiprocessing.get_context("spawn")
    children: list[Any] = []
    receivers: list[Any] = []
    signals_received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        signals_received.append(number)
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    context.Lock()  # starts multiprocessing's resource tracker now: started with a child, it would unblock signals
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited: signals wait until a child handles them
    for local_rank in range(topology.processes):
        # One pipe per child: a process killed as it reports would keep the lock of a shared queue.
        receiver, sender = context.Pipe(duplex=False)
        arguments = (worker, topology.ranks(local_rank), sender, os.getpid())
        children.append(context.Process(target=_child, args=arguments))
        children[-1].start()
        sender.close()  # the child's end is then the only one
        receivers.append(receiver)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if signals_received:  # before all children had started
        pass_on(signals_received[0], None)
    code, text = exit_code(_wait_for(children, receivers, topology.ranks().rank))
    if text:
        show = console.unexpected if "\n" in text else console.warning if code == EXIT_STOPPED else console.error
        show(text)
    return code


def _child(worker: Worker, ranks: Ranks, pipe: Any, parent: int) -> None:
    """Run the worker in a spawned process; if it fails, send a Report through the pipe."""
    die_with_parent(parent)
    console.escape_unprintable()

    def send(report: Report) -> None:
        # The end of it: a pipe holds 64 KiB, and the launcher reads it only after this process has exited.
        pipe.send(report._replace(text=report.text[-10000:]))

    try:
        code = _run(worker, ranks, lambda text, rank: send(Report(text, about_peers=True, lost=rank)))
    except UserError as error:
        send(Report(str(error), is_user_error=True, about_peers=isinstance(error, RendezvousError)))
        console.exit_process(error.exit_code)
    except Exception:
        send(Report(traceback.format_exc()))
        console.exit_process(EXIT_FAILURE)
    console.exit_process(code)


def _wait_for(children: Sequence[Any], receivers: Sequence[Any], first_rank: int) -> list[Outcome]:
    """Wait until all children have ended, and return how, in that order. Kills those whose time is over."""
    running, outcomes = dict(enumerate(children, first_rank)), []
    deadlines = dict.fromkeys(running, math.inf)
    while running:
        deadline = min(deadlines[rank] for rank in running)
        timeout = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait([child.sentinel for child in running.values()], timeout)
        now = time.monotonic()
        for rank, child in list(running.items()):
            if child.sentinel in ended:
                child.join()
                del running[rank]
                outcome = _outcome(rank, child.exitcode, receivers[rank - first_rank], killed=now >= deadlines[rank])
                outcomes.append(outcome)
                if outcome.code != 0:
                    deadlines = {other: min(limit, now + GRACE_SECONDS) for other, limit in deadlines.items()}
                if outcome.report.lost in running:
                    deadlines[outcome.report.lost] = min(deadlines[outcome.report.lost], now + LOST_SECONDS)
            elif now >= deadlines[rank]:
                child.kill()
                time.sleep(0.1)  # until it has ended, which may take a while
    return outcomes


def _outcome(rank: int, code: int, receiver: Any, *, killed: bool) -> Outcome:
    """killed: by this launcher, which is no cause of anything."""
    report = Report()
    with contextlib.suppress(EOFError, OSError):  # it had nothing to report, or was killed while it did
        if receiver.poll():
            report = receiver.recv()
    if code < 0 and killed:
        return Outcome(rank, EXIT_FAILURE, report)
    if code < 0:
        return Outcome(rank, 128 - code, Report(f"the process of rank {rank} was killed by signal {-code}"))
    return Outcome(rank, code, report)


def exit_code(outcomes: Sequence[Outcome]) -> tuple[int, str]:
    """Return the exit code of the job and the message to print, if any, from the ends of its processes, in their order.

    The code is 0 or 75 if all exit so, else that of the cause: a UserError, which says more than a traceback, else the
    first failure that is not about a lost peer.
    """
    failures = [one for one in outcomes if one.code not in (0, EXIT_STOPPED)]
    causes = [one for one in failures if one.report.text and not one.report.about_peers]
    stopped = [one.rank for one in outcomes if one.code == EXIT_STOPPED]
    if stopped and not causes:
        # A process was stopped before training or in an evaluation, and the others lost it. Rank 0 says so itself.
        said = min(one.rank for one in outcomes) in stopped
        return EXIT_STOPPED, "" if said else "a process was stopped by a signal; there was nothing to save"
    causes.sort(key=lambda one: not one.report.is_user_error)
    for one in [*causes, *(one for one in failures if one.report.text), *failures]:
        return one.code, one.report.text
    return 0, ""
