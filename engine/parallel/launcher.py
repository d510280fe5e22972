# SPDX-License-Identifier: BSD-3-Clause
"""Nodes and ranks of a job, and starting one process per device. torchrun and Slurm start the processes themselves."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import random
import re
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

from engine import console
from engine.console import escape_unprintable, exit_process, remove_at_exit
from engine.errors import EXIT_FAILURE, EXIT_STOPPED, RendezvousError, UsageError, UserError
from engine.signals import STOP_SIGNALS, die_with_parent

MULTI_NODE_PORT = 59629
LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 30  # before the others are killed, once one process has failed or stopped: they may be saving

Worker = Callable[[argparse.Namespace, Callable[[str], None]], int]


# --- who runs where ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topology:
    """Nodes and processes of a job. A process started by hand counts as a node of its own."""

    nodes: int
    node_rank: int
    processes: int  # on this node
    dist_url: str
    spawn: bool  # whether this program starts them


def under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def resolve_topology(
    *, multiprocessing_distributed: bool, world_size: int, rank: int, addr: str, dist_url: str | None, devices: int
) -> Topology:
    """Return the topology that the flags, or torchrun's variables, describe. Raises UsageError.

    world_size and rank count nodes with multiprocessing_distributed, processes without. devices: number to use here.
    """
    if under_torchrun():
        _variable("LOCAL_RANK", 0)  # read by each process
        processes = _variable("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else 1
        nodes, node_rank = _variable("WORLD_SIZE", 1) // processes, _variable("RANK", 0) // processes
        return Topology(nodes, node_rank, processes, dist_url or "env://", spawn=False)
    nodes = max(1, world_size)
    if nodes == 1:
        rank = 0
    elif not 0 <= rank < nodes:
        raise UsageError(
            f"--rank {rank} does not fit --world-size {nodes}: give each node its own, from 0 to {nodes - 1}"
        )
    processes = devices if multiprocessing_distributed else 1
    return Topology(nodes, rank, processes, _rendezvous_url(dist_url, addr, nodes), spawn=multiprocessing_distributed)


def _variable(name: str, at_least: int) -> int:
    """Return a variable that torchrun sets. Raises UsageError."""
    text = os.environ.get(name, "")
    if not text.isdigit() or int(text) < at_least:
        raise UsageError(
            f"the variable {name} must be at least {at_least}, got {text!r}: torchrun sets it, or unset it"
        )
    return int(text)


def _rendezvous_url(dist_url: str | None, addr: str, nodes: int) -> str:
    """Return --dist-url, else one of --addr, with a free port on one node and 59629 on several."""
    host, port = addr, None
    if dist_url:
        match = re.match(r"^tcp://(\[[^\]]+\]|[^:/]+)(?::(\d+))?/?$", dist_url)
        if match is None:
            if dist_url.startswith("env://"):
                return dist_url
            raise UsageError(f"--dist-url: expected tcp://HOST:PORT or env://, got {dist_url}")
        # The reference's scripts pass a loopback URL and the real address beside it.
        given = match.group(1).strip("[]")
        host = addr if given in LOOPBACK and addr not in LOOPBACK else given
        port = match.group(2)
        if port is not None and not 1 <= int(port) <= 65535:
            raise UsageError(f"--dist-url: expected a port from 1 to 65535, got {port}")
    if port is None:
        port = str(free_port() if nodes == 1 else MULTI_NODE_PORT)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def free_port() -> int:
    """Return a port that is free now, below those that the kernel gives to connections: it is bound a second later."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


# --- starting the processes -------------------------------------------------------------------------------------------


def launch(worker: Worker, args: argparse.Namespace, topology: Topology) -> int:
    """Run worker(args, report) in every process of this node; return the exit code. Raises what worker raises.

    report: how the worker says that another rank is unreachable.
    """
    # DataLoader workers put sockets in this folder. They inherit it; otherwise each would make one that stays behind.
    remove_at_exit(multiprocessing.util.get_temp_dir())
    if topology.spawn:
        return _spawn(worker, args, topology)
    if under_torchrun():
        die_with_parent(os.getppid())
    else:
        os.environ.update(
            RANK=str(topology.node_rank), WORLD_SIZE=str(topology.nodes), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"
        )
    return worker(args, console.error)


class Report(NamedTuple):
    """Why a process has failed."""

    text: str  # one line, or a traceback
    code: int | None = None  # the exit code of a UserError
    about_peers: bool = False  # it reports a lost peer: a consequence, not the cause


def _spawn(worker: Worker, args: argparse.Namespace, topology: Topology) -> int:
    """Start one process per device, wait for all of them, and return the job's exit code.

    The code is 0 or 75 if all exit so, else that of the first process that failed; its error is printed once. Stop
    signals are passed on to the processes. None of them outlives this one.
    """
    context = multiprocessing.get_context("spawn")
    first_rank = topology.node_rank * topology.processes
    children, pipes = [], []
    for local_rank in range(topology.processes):
        environment = {
            "RANK": str(first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(topology.nodes * topology.processes),
            "LOCAL_WORLD_SIZE": str(topology.processes),
        }
        # One pipe per child: a process killed as it reports would keep the lock of a shared queue.
        receiver, sender = context.Pipe(duplex=False)
        children.append(context.Process(target=_child, args=(worker, args, environment, sender, os.getpid())))
        pipes.append((receiver, sender))

    signals_received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        signals_received.append(number)
        for child in children:
            if child.pid and child.is_alive():
                os.kill(child.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    context.Lock()  # starts multiprocessing's resource tracker now: started with a child, it would unblock signals
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited: signals wait until a child handles them
    for child, (_, sender) in zip(children, pipes):
        child.start()
        sender.close()  # the child's end is then the only one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if signals_received:  # before all children had started
        pass_on(signals_received[0], None)
    return _wait_for(children, [receiver for receiver, _ in pipes], first_rank)


def _wait_for(children: list[Any], receivers: list[Any], first_rank: int) -> int:
    running, code, deadline, killed = list(children), 0, None, False
    reports: list[Report] = []
    while running:
        timeout = None if deadline is None or killed else max(0.0, deadline - time.monotonic())
        ended = multiprocessing.connection.wait([child.sentinel for child in running], timeout=timeout)
        if not ended:
            for child in running:
                child.kill()
            killed = True
        for child in [child for child in running if child.sentinel in ended]:
            child.join()
            running.remove(child)
            with contextlib.suppress(EOFError, OSError):  # it had nothing to report, or was killed while it did
                receiver = receivers[children.index(child)]
                if receiver.poll():
                    reports.append(receiver.recv())
            if child.exitcode not in (0, EXIT_STOPPED) and code in (0, EXIT_STOPPED) and not killed:
                code = child.exitcode
                if code < 0:
                    rank, number, code = first_rank + children.index(child), -code, 128 - code
                    reports.insert(0, Report(f"the process of rank {rank} was killed by signal {number}"))
            elif child.exitcode == EXIT_STOPPED and code == 0:
                code = EXIT_STOPPED
            if child.exitcode != 0 and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    causes = [report for report in reports if not report.about_peers]
    if not causes and any(child.exitcode == EXIT_STOPPED for child in children):
        # A process was stopped before training or in an evaluation, and the others lost it. Rank 0 says so itself.
        if children[0].exitcode != EXIT_STOPPED:
            console.warning("a process was stopped by a signal; there was nothing to save")
        return EXIT_STOPPED
    first = next((report for report in causes if report.code is not None), None) or next(iter(causes + reports), None)
    if first is not None:
        if "\n" in first.text:
            console.unexpected(first.text)
        else:
            console.error(first.text)
        code = first.code or code
    return code


def _child(worker: Worker, args: argparse.Namespace, environment: dict[str, str], pipe: Any, parent: int) -> None:
    """Run the worker in a spawned process; if it fails, send a Report through the pipe."""
    die_with_parent(parent)
    escape_unprintable()
    os.environ.update(environment)
    if environment["LOCAL_RANK"] != "0":
        console.be_quiet()

    def report_peer(text: str) -> None:
        _send(pipe, Report(text, about_peers=True))

    try:
        code = worker(args, report_peer)
    except UserError as error:
        _send(pipe, Report(str(error), error.exit_code, isinstance(error, RendezvousError)))
        exit_process(error.exit_code)
    except Exception:
        _send(pipe, Report(traceback.format_exc()))
        exit_process(EXIT_FAILURE)
    exit_process(code)


def _send(pipe: Any, report: Report) -> None:
    """Send the end of a report: a pipe holds 64 KiB, and the launcher reads it only after this process has exited."""
    pipe.send(report._replace(text=report.text[-10000:]))
