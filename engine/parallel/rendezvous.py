# SPDX-License-Identifier: BSD-3-Clause
"""How the processes of a job find each other: in any order, waiting for late nodes and naming them.

What cannot work fails immediately: a duplicate rank, different world sizes, a port in use, an address of another host.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import errno
import math
import os
import socket
import time
from typing import Any

from engine import console
from engine.errors import RendezvousError, counted, first_line
from engine.parallel.heartbeat import beats
from engine.parallel.topology import Ranks

import torch.distributed as dist

REPORT_SECONDS = 15  # between two log lines that name the missing nodes
POLL_SECONDS = 0.5
STORE_TIMEOUT = datetime.timedelta(seconds=45)  # of one operation on the store
SECOND_RANK_0_SECONDS = 10


def meet(url: str, ranks: Ranks, timeout: float) -> tuple[Any, Any]:
    """Wait until all processes have joined, `timeout` seconds at most. Raises RendezvousError.

    url: tcp://HOST:PORT or env:// (MASTER_ADDR and MASTER_PORT). Returns two connections to the store of the job, one
    for torch and one for the heartbeat: an operation that waits holds up all others on the same connection. Rank 0's
    first one serves all processes.
    """
    address = url
    if url == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not (host and port.isdigit()):
            raise RendezvousError("--dist-url env:// requires MASTER_ADDR and MASTER_PORT, as torchrun sets them")
        address = f"tcp://{host}:{port}"
    # torchrun holds the store itself. It outlives a restart, with what the earlier processes wrote.
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT'] if agent_store else 0}"
    meeting = _Meeting(address, ranks, timeout)
    while True:
        try:
            is_host = meeting.await_store(ranks.rank == 0 and not agent_store, own_address=url != "env://")
            meeting.store, second = [dist.PrefixStore(attempt, meeting.open_store(host)) for host in (is_host, False)]
            meeting.check_in()
            return meeting.store, second
        except (RuntimeError, OSError, ValueError) as error:
            if not isinstance(error, RuntimeError) or ranks.rank == 0 or time.monotonic() > meeting.end:
                raise RendezvousError(
                    f"{address}: rendezvous failed for rank {ranks.rank} of {ranks.world_size} ({first_line(error)}); "
                    "check --addr, --dist-url, --rank and --world-size"
                ) from error
            meeting.store = None  # rank 0 was restarted while others were missing: meet it again
            time.sleep(POLL_SECONDS)


class _Meeting:
    """One process's wait for the others: who it is, where they meet, and since when it waits."""

    def __init__(self, address: str, ranks: Ranks, timeout: float) -> None:
        host, _, port = address[len("tcp://") :].rstrip("/").rpartition(":")
        self.address, self.master = address, (host.strip("[]"), int(port))
        self.ranks, self.timeout = ranks, timeout
        self.store: Any = None  # when rank 0's is reached
        self.last_report = time.monotonic()
        self.end = self.last_report + timeout

    def check_time(self) -> None:
        """Print which nodes are missing, if that is due. Raises RendezvousError when the time is over."""
        now = time.monotonic()
        if now > self.end:
            raise RendezvousError(
                f"{self.address}: rendezvous failed: {', '.join(self.missing())} did not join within "
                f"{self.timeout:.0f} s; check that every node is running and reaches this address, or raise "
                "--rendezvous-timeout"
            )
        if now - self.last_report >= REPORT_SECONDS:
            self.last_report = now
            missing = self.missing()
            nodes = counted(-(-self.ranks.world_size // self.ranks.local_world_size), "node")
            waited = f"{now - self.end + self.timeout:.0f} s of {self.timeout:.0f} s"
            verb = "has" if len(missing) == 1 else "have"
            console.line(f"=> waiting for {len(missing)} of {nodes}: {', '.join(missing)} {verb} not joined, {waited}")

    def missing(self) -> list[str]:
        """Name the nodes of the ranks that have never beaten, if all nodes have as many processes as this one."""
        names, size = [], self.ranks.local_world_size
        for first in range(0, self.ranks.world_size, size) if self.store is not None else [0]:
            node = range(first, first + size)
            missing = [str(rank) for rank in node if self.store is None or beats(self.store, rank) == 0]
            if len(missing) == size:
                ranks = f"rank {first}" if size == 1 else f"ranks {first} to {node[-1]}"
                names.append(f"node {first // size} ({ranks})")
            elif missing:
                names.append(f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} of node {first // size}")
        return names or ["a process"]  # it joins at this moment

    def await_store(self, is_host: bool, own_address: bool) -> bool:
        """Wait until rank 0's store accepts connections. Returns whether this process is to open it.

        is_host: whether it should; own_address: only if the address is this host's. Raises RendezvousError.
        """
        deadline = math.inf
        if is_host:
            error = _bind_error(self.master[0] if own_address else "", self.master[1])
            if error == errno.EADDRINUSE:  # torch would raise an untyped RuntimeError
                raise RendezvousError(
                    f"{self.address}: the port is in use; choose a free one with --dist-url tcp://HOST:PORT"
                )
            if error != errno.EADDRNOTAVAIL:
                return True
            # If rank 0 is there, this process is a second one, and check_in says so.
            deadline = time.monotonic() + SECOND_RANK_0_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                socket.create_connection(self.master, timeout=5).close()
                return False
            self.check_time()
            time.sleep(POLL_SECONDS)
        raise RendezvousError(
            f"{self.address}: {self.master[0]} is not an address of this host, and rank 0 must listen there; check "
            "--addr and --rank"
        )

    def open_store(self, is_host: bool) -> Any:
        """Return rank 0's store, or create it. Raises RendezvousError if something else answers on that port."""
        # In a thread: torch waits without end for an answer. World size 1: else it waits for all and logs nothing.
        thread = concurrent.futures.ThreadPoolExecutor(1)
        opened = thread.submit(dist.TCPStore, *self.master, 1, is_host, STORE_TIMEOUT)
        while concurrent.futures.wait([opened], timeout=POLL_SECONDS).not_done:
            self.check_time()
        return opened.result()

    def check_in(self) -> None:
        """Claim this rank with its first beat, and beat until every rank is claimed. Raises RendezvousError."""
        store, rank, world_size = self.store, self.ranks.rank, self.ranks.world_size
        if store.add("joined first", 1) == 1:
            store.set("world size", str(world_size))
        expected = int(store.get("world size").decode())
        if expected != world_size:
            sizes = f"{world_size} on rank {rank}, {expected} on the first to join"
            self._fail_all(f"the nodes have different world sizes: {sizes}")
        count = beats(store, rank, 1)
        if count == 1:
            store.add("joined", 1)
        elif store.add("joined", 0) >= world_size:
            raise RendezvousError(f"{self.address}: the job has started already, with another process of rank {rank}")
        else:  # another process of this rank has been here: if it is still waiting, it beats
            time.sleep(5 * POLL_SECONDS)
            if beats(store, rank) > count:
                self._fail_all(f"two processes are rank {rank}: give each node its own --rank")
        while store.add("joined", 0) < world_size:
            beats(store, rank, 1)
            self._raise_if_failed()
            self.check_time()
            time.sleep(POLL_SECONDS)
        self._raise_if_failed()

    def _fail_all(self, text: str) -> None:
        """Make every process that waits raise this error."""
        self.store.set("failure", f"{self.address}: {text}")
        self.store.add("failed", 1)
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self.store.add("failed", 0):
            text = self.store.get("failure").decode()
            if self.ranks.rank == 0:
                time.sleep(4 * POLL_SECONDS)  # the store may live in this process: let the others read it
            raise RendezvousError(text)


def _bind_error(host: str, port: int) -> int | None:
    """Return the error number of listening there, if it fails. Without a host: on all addresses of this one."""
    family, _, _, _, address = socket.getaddrinfo(host, port)[0] if host else (socket.AF_INET, 0, 0, "", ("", port))
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error.errno
    return None
