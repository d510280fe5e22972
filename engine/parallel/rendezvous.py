# SPDX-License-Identifier: BSD-3-Clause
"""How the processes of a job find each other: in any order, waiting for late nodes and naming them.

What cannot work fails immediately: a duplicate rank, different world sizes, a port in use, an address of another host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import errno
import os
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Callable

from engine import console
from engine.errors import RendezvousError, first_line

import torch.distributed as dist

REPORT_SECONDS = 15  # between two log lines that name the missing nodes
POLL_SECONDS = 0.5
STORE_SECONDS = 45  # timeout of one operation on the store
SECOND_RANK_0_SECONDS = 10


@dataclass
class Member:
    """This process in its job, and how long it waits for the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    timeout: float  # seconds

    def node(self, rank: int) -> str:
        """Name the node of a rank, if all nodes have as many processes as this one."""
        node, size = rank // self.local_world_size, self.local_world_size
        ranks = f"rank {rank}" if size == 1 else f"ranks {node * size} to {node * size + size - 1}"
        return f"node {node} ({ranks})"


@dataclass
class JobStore:
    """Where the processes have met."""

    store: Any  # of torch.distributed; closes with this object, and rank 0's serves all processes
    master: tuple[str, int]  # host and port of the store
    job: str  # prefix of this attempt's keys


def rendezvous(url: str, member: Member) -> JobStore:
    """Wait until all processes have joined. Raises RendezvousError.

    url: tcp://HOST:PORT or env:// (MASTER_ADDR and MASTER_PORT).
    """
    address = url
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not (host and port.isdigit()):
            raise RendezvousError("--dist-url env:// requires MASTER_ADDR and MASTER_PORT, as torchrun sets them")
        address = f"tcp://{host}:{port}"
    host, _, port = address[len("tcp://") :].rstrip("/").rpartition(":")
    master = host.strip("[]"), int(port)
    # torchrun holds the store itself. It outlives a restart, with what the earlier processes wrote.
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    job = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT'] if agent_store else 0}"
    waiting = _Waiting(address, member)
    rank, world_size = member.rank, member.world_size
    while True:
        try:
            is_host = rank == 0 and not agent_store
            if is_host and url != "env://" and not _is_own_address(master[0]):
                is_host = False  # if rank 0 is there, this process is a second one, and _check_in says so
                _await_rank_0(master, address)
            elif is_host:
                _check_port(master[1], address)
            else:
                _await_store(master, waiting)
            store = dist.PrefixStore(job, _open_store(master, is_host, waiting))
            _check_in(store, address, member, waiting)
            return JobStore(store, master, job)
        except (RuntimeError, OSError, ValueError) as error:
            if isinstance(error, RuntimeError) and rank != 0 and not waiting.is_over():
                time.sleep(POLL_SECONDS)  # rank 0 was restarted while others were missing: meet it again
                waiting.check(lambda: [member.node(0)])
                continue
            raise RendezvousError(
                f"{address}: rendezvous failed for rank {rank} of {world_size} ({first_line(error)}); check --addr, "
                "--dist-url, --rank and --world-size"
            ) from error


class _Waiting:
    """The clock of a rendezvous: when a line is due, and when the time is over."""

    def __init__(self, address: str, member: Member) -> None:
        self.address, self.member = address, member
        self.begin = self.last_report = time.monotonic()

    def is_over(self) -> bool:
        return time.monotonic() - self.begin > self.member.timeout

    def check(self, find_missing: Callable[[], list[str]]) -> None:
        """Print which nodes are missing, if that is due. Raises RendezvousError when the time is over."""
        now = time.monotonic()
        waited, timeout = now - self.begin, self.member.timeout
        if self.is_over():
            raise RendezvousError(
                f"{self.address}: rendezvous failed: {', '.join(find_missing())} did not join within {timeout:.0f} s; "
                "check that every node is running and reaches this address, or raise --rendezvous-timeout"
            )
        if now - self.last_report >= REPORT_SECONDS:
            self.last_report = now
            missing, nodes = find_missing(), -(-self.member.world_size // self.member.local_world_size)
            verb = "has" if len(missing) == 1 else "have"
            console.line(
                f"=> waiting for {len(missing)} of {nodes} nodes: {', '.join(missing)} {verb} not joined, "
                f"{waited:.0f} s of {timeout:.0f} s"
            )


def _check_port(port: int, address: str) -> None:
    """Raise RendezvousError if rank 0 cannot listen on a port. torch would raise an untyped RuntimeError."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise RendezvousError(
                    f"{address}: the port is in use; choose a free one with --dist-url tcp://HOST:PORT"
                ) from error
            raise


def _is_own_address(host: str) -> bool:
    family, _, _, _, own = socket.getaddrinfo(host, 0)[0]
    with socket.socket(family) as probe:
        try:
            probe.bind(own)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            raise
    return True


def _await_rank_0(master: tuple[str, int], address: str) -> None:
    """Return if another process is rank 0 there. Raises RendezvousError if none is within ten seconds."""
    deadline = time.monotonic() + SECOND_RANK_0_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(master, timeout=POLL_SECONDS).close()
            return
        time.sleep(POLL_SECONDS)
    raise RendezvousError(
        f"{address}: {master[0]} is not an address of this host, and rank 0 must listen there; check --addr and --rank"
    )


def _await_store(master: tuple[str, int], waiting: _Waiting) -> None:
    """Wait until rank 0's store accepts connections. Raises RendezvousError."""
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(master, timeout=5).close()
            return
        waiting.check(lambda: [waiting.member.node(0)])
        time.sleep(POLL_SECONDS)


def _open_store(master: tuple[str, int], is_host: bool, waiting: _Waiting) -> Any:
    """Return rank 0's store, or create it. Raises RendezvousError if something else answers on that port."""
    opened: concurrent.futures.Future = concurrent.futures.Future()

    def open_store() -> None:  # in a thread: torch waits without end for an answer
        try:
            # World size 1: otherwise TCPStore blocks until all have joined, and logs nothing.
            opened.set_result(dist.TCPStore(*master, 1, is_host, datetime.timedelta(seconds=STORE_SECONDS)))
        except Exception as error:
            opened.set_exception(error)

    threading.Thread(target=open_store, daemon=True).start()
    while True:
        try:
            return opened.result(timeout=POLL_SECONDS)
        except concurrent.futures.TimeoutError:
            waiting.check(lambda: [waiting.member.node(0)])


def _check_in(store: Any, address: str, member: Member, waiting: _Waiting) -> None:
    """Claim this process's rank in the store, and wait until every rank is claimed. Raises RendezvousError."""
    if store.add("joined first", 1) == 1:
        store.set("world size", str(member.world_size))
    expected = int(store.get("world size").decode())
    if expected != member.world_size:
        sizes = f"{member.world_size} on rank {member.rank}, {expected} on the first to join"
        _fail_all(store, f"{address}: the nodes have different world sizes: {sizes}", member)
    if store.add(f"rank {member.rank}", 1) == 1:
        store.add("joined", 1)
    elif _is_beating(store, member.rank):
        _fail_all(store, f"{address}: two processes are rank {member.rank}: give each node its own --rank", member)
    elif store.add(f"beat/{member.rank}", 0):  # of the Heartbeat
        raise RendezvousError(f"{address}: the job has started already, with another process of rank {member.rank}")
    while store.add("joined", 0) < member.world_size:
        store.add(f"beat {member.rank}", 1)
        _raise_if_failed(store, member)
        waiting.check(lambda: _name_missing(store, member))
        time.sleep(POLL_SECONDS)
    _raise_if_failed(store, member)


def _is_beating(store: Any, rank: int) -> bool:
    """Whether another process of this rank is waiting too. A claim without beats is that of a process that is gone."""
    before = store.add(f"beat {rank}", 0)
    time.sleep(5 * POLL_SECONDS)
    return store.add(f"beat {rank}", 0) > before


def _name_missing(store: Any, member: Member) -> list[str]:
    """Name the nodes of which ranks are missing."""
    names, size = [], member.local_world_size
    for first in range(0, member.world_size, size):
        missing = [rank for rank in range(first, first + size) if store.add(f"rank {rank}", 0) == 0]
        if len(missing) == size:
            names.append(member.node(first))
        elif missing:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
            names.append(f"{ranks} of node {first // size}")
    return names or ["a process"]  # it joins at this moment


def _fail_all(store: Any, text: str, member: Member) -> None:
    """Make every process that waits raise this error."""
    store.set("failure", text)
    store.add("failed", 1)
    _raise_if_failed(store, member)


def _raise_if_failed(store: Any, member: Member) -> None:
    if store.add("failed", 0):
        text = store.get("failure").decode()
        if member.rank == 0:
            time.sleep(4 * POLL_SECONDS)  # the store may live in this process: let the others read it
        raise RendezvousError(text)
