# SPDX-License-Identifier: BSD-3-Clause
"""Nodes and ranks of a job: from the flags, or from the variables of torchrun, Slurm or a Kubernetes operator."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
from dataclasses import dataclass
from typing import NamedTuple

from engine import console
from engine.errors import UsageError

MULTI_NODE_PORT = 59629
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Ranks(NamedTuple):
    """The place of a process in its job and on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True)
class Topology:
    """Nodes and processes of a job. A process started by hand counts as a node of its own."""

    nodes: int
    node_rank: int
    processes: int  # on this node
    dist_url: str
    spawn: bool  # whether this program starts them

    def ranks(self, local_rank: int = 0) -> Ranks:
        """Return the place of a process of this node; of this process itself if torchrun has started it."""
        if under_torchrun():
            return _torchrun_ranks()
        first = self.node_rank * self.processes
        return Ranks(first + local_rank, self.nodes * self.processes, local_rank, self.processes)


def under_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def _torchrun_ranks() -> Ranks:
    processes = _variable("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else 1
    return Ranks(_variable("RANK", 0), _variable("WORLD_SIZE", 1), _variable("LOCAL_RANK", 0), processes)


def _variable(name: str, at_least: int) -> int:
    """Return a variable that torchrun sets. Raises UsageError."""
    text = os.environ.get(name, "")
    if not text.isdigit() or int(text) < at_least:
        raise UsageError(
            f"the variable {name} must be at least {at_least}, got {text!r}: torchrun sets it, or unset it"
        )
    return int(text)


def resolve_topology(
    *, multiprocessing_distributed: bool, world_size: int, rank: int, addr: str, dist_url: str | None, devices: int
) -> Topology:
    """Return the topology that the flags, or torchrun's variables, describe. Raises UsageError.

    world_size and rank count nodes with multiprocessing_distributed, processes without. devices: number to use here.
    """
    if under_torchrun():
        here = _torchrun_ranks()
        processes = here.local_world_size
        if here.world_size % processes:
            sizes = f"WORLD_SIZE {here.world_size} is not divisible by LOCAL_WORLD_SIZE {processes}"
            raise UsageError(f"{sizes}: start as many processes on each node")
        nodes, node_rank = here.world_size // processes, here.rank // processes
        return Topology(nodes, node_rank, processes, dist_url or "env://", spawn=False)
    if world_size < 0 and "WORLD_SIZE" in os.environ:  # without LOCAL_RANK, as Kubernetes operators set it
        if dist_url == "env://":
            world_size, rank = _variable("WORLD_SIZE", 1), rank if rank >= 0 else _variable("RANK", 0)
        elif "RANK" in os.environ and os.environ["WORLD_SIZE"] != "1":
            console.warning(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} and RANK={os.environ['RANK']} are ignored and this node trains "
                "alone: give --dist-url env:// to use them, or unset them"
            )
    nodes = max(1, world_size)
    if nodes == 1:
        rank = 0
    elif not 0 <= rank < nodes:
        raise UsageError(
            f"--rank {rank} does not fit --world-size {nodes}: give each node its own, from 0 to {nodes - 1}"
        )
    processes = devices if multiprocessing_distributed else 1
    return Topology(nodes, rank, processes, _rendezvous_url(dist_url, addr, nodes), spawn=multiprocessing_distributed)


def _rendezvous_url(dist_url: str | None, addr: str, nodes: int) -> str:
    """Return --dist-url, else one of --addr, with a free port on one node and 59629 on several."""
    if dist_url == "env://":
        return dist_url
    host, port = addr, None
    if dist_url:
        match = re.match(r"^tcp://(\[[^\]]+\]|[^:/]+)(?::(\d+))?/?$", dist_url)
        if match is None:
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
