# SPDX-License-Identifier: BSD-3-Clause
"""A network of several nodes on one host: network namespaces joined by a bridge. Needs root and iproute2.

python test/helpers/namespaces.py up NAME COUNT               # prints the address of each node
python test/helpers/namespaces.py run NAME NODE COMMAND ...   # run a command on a node
python test/helpers/namespaces.py disconnect NAME NODE        # take down the node's port of the bridge
python test/helpers/namespaces.py connect NAME NODE
python test/helpers/namespaces.py kill NAME NODE              # SIGKILL to all processes of a node
python test/helpers/namespaces.py down NAME                   # kill all processes and remove the network
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
from typing import Iterator

INTERFACE = "eth0"  # of every node


class NamespaceError(Exception):
    """The network cannot be set up or changed: ip is missing or refused, usually for lack of privileges."""


def _ip(*words: str) -> str:
    """Run ip and return its output. Raises NamespaceError."""
    try:
        finished = subprocess.run(["ip", *words], capture_output=True, text=True)
    except OSError as error:
        raise NamespaceError(f"cannot run ip: {error.strerror}") from error
    if finished.returncode != 0:
        raise NamespaceError(f"ip {' '.join(words)}: {finished.stderr.strip() or f'exit code {finished.returncode}'}")
    return finished.stdout


class Network:
    """Nodes 0 to count-1: the namespaces NAME-0, NAME-1, ..., and the bridge between them in NAME-bridge."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bridge = f"{name}-bridge"

    def namespace(self, node: int) -> str:
        return f"{self.name}-{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def command(self, node: int) -> list[str]:
        """The words to put in front of a command to run it on a node."""
        return ["ip", "netns", "exec", self.namespace(node)]

    def up(self, count: int) -> None:
        """Create the namespaces; none is left if one cannot be created. Raises NamespaceError."""
        try:
            self._create(count)
        except NamespaceError:
            self.down()
            raise

    def _create(self, count: int) -> None:
        _ip("netns", "add", self.bridge)
        _ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.bridge, "link", "set", "bridge", "up")
        for node in range(count):
            namespace, port = self.namespace(node), f"port{node}"
            _ip("netns", "add", namespace)
            veth = ["type", "veth", "peer", "name", INTERFACE, "netns", namespace]
            _ip("-n", self.bridge, "link", "add", port, *veth)
            _ip("-n", self.bridge, "link", "set", port, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"{self.address(node)}/24", "dev", INTERFACE)
            _ip("-n", namespace, "link", "set", INTERFACE, "up")
            _ip("-n", namespace, "link", "set", "lo", "up")

    def disconnect(self, node: int) -> None:
        """Take down the node's port of the bridge: the node loses its carrier, as if the cable were pulled."""
        _ip("-n", self.bridge, "link", "set", f"port{node}", "down")

    def connect(self, node: int) -> None:
        _ip("-n", self.bridge, "link", "set", f"port{node}", "up")

    def drop_packets(self, node: int) -> None:
        """Take the node's port off the bridge: carrier and routes stay, but every packet is lost."""
        _ip("-n", self.bridge, "link", "set", f"port{node}", "nomaster")

    def kill(self, node: int) -> None:
        """SIGKILL to every process of the node, as in a power failure."""
        self._kill(self.namespace(node))

    def down(self) -> None:
        """Kill the processes of all nodes and remove the namespaces, if there are any."""
        existing = []
        with contextlib.suppress(NamespaceError):
            existing = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]
        for namespace in existing:
            if re.fullmatch(rf"{re.escape(self.name)}-(\d+|bridge)", namespace):
                self._kill(namespace)
                _ip("netns", "delete", namespace)

    @staticmethod
    def _kill(namespace: str) -> None:
        for pid in _ip("netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def network(count: int, name: str | None = None) -> Iterator[Network]:
    """A network of `count` nodes that is removed at the end, with all processes on it. Raises NamespaceError."""
    nodes = Network(name or f"net{os.getpid()}")
    nodes.up(count)
    try:
        yield nodes
    finally:
        nodes.down()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True
    for command in ("up", "down", "run", "kill", "connect", "disconnect"):
        words = commands.add_parser(command)
        words.add_argument("name", metavar="NAME")
        if command == "up":
            words.add_argument("count", metavar="COUNT", type=int)
        elif command != "down":
            words.add_argument("node", metavar="NODE", type=int)
        if command == "run":
            words.add_argument("program", metavar="COMMAND", nargs=argparse.REMAINDER)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    nodes = Network(args.name)
    if args.command == "up":
        nodes.up(args.count)
        for node in range(args.count):
            print(nodes.address(node))
    elif args.command == "down":
        nodes.down()
    elif args.command == "run":
        words = nodes.command(args.node) + args.program
        os.execvp(words[0], words)
    else:
        getattr(nodes, args.command)(args.node)


if __name__ == "__main__":
    try:
        main()
    except NamespaceError as error:
        sys.exit(f"namespaces.py: error: {error}")
