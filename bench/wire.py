# SPDX-License-Identifier: BSD-3-Clause
"""Bytes and seconds per step on the network: main.py in two processes joined by a link of a given speed.

    sudo python bench/wire.py                                   # the unlimited link, 10 Gbit/s and 1 Gbit/s
    sudo python bench/wire.py --rates 1 -- --grad-compress bf16 # flags after -- are measured after the plain run

Each process runs in a network namespace; the token bucket filter (tbf) of tc limits the link in both directions.
The model is the real VGG16. The images are synthetic (--dummy), so small and so few that the network dominates.
Bytes are the kernel's count of what node 0 sent, headers included. The first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
sys.path.insert(0, os.path.join(REPOSITORY, "test"))
from helpers.namespaces import INTERFACE, NamespaceError, Network, network  # noqa: E402

MAIN = os.path.join(REPOSITORY, "main.py")
NODES = 2
WARM_UP_STEPS = 3


def limit_rate(nodes: Network, gigabits: float) -> None:
    """Limit both directions to that many Gbit/s; 0 removes the limit."""
    for node in range(NODES):
        tc = ["tc", "-n", nodes.namespace(node), "qdisc"]
        subprocess.run([*tc, "del", "dev", INTERFACE, "root"], stderr=subprocess.DEVNULL)
        if gigabits:
            # Two milliseconds of traffic, and at least a few of the 64 KiB packets that a veth passes unsegmented.
            bucket = max(int(gigabits * 1e9 / 8 * 0.002), 512 * 1024)
            limits = ["rate", f"{int(gigabits * 1000)}mbit", "burst", str(bucket), "limit", str(4 * bucket)]
            subprocess.run([*tc, "add", "dev", INTERFACE, "root", "tbf", *limits], check=True)


def bytes_sent(nodes: Network, node: int) -> int:
    counter = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    return int(subprocess.run([*nodes.command(node), "cat", counter], check=True, stdout=subprocess.PIPE).stdout)


def measure(nodes: Network, steps: int, flags: list[str]) -> list[tuple[int, float]]:
    """(bytes, seconds) of each step after the first ones, as seen by node 0. Raises RuntimeError if main.py fails."""
    environment = dict(os.environ, GLOO_SOCKET_IFNAME=INTERFACE)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for node in range(NODES):
            core = str(node % (os.cpu_count() or 1))
            command = [*nodes.command(node), "taskset", "-c", core, sys.executable, "-u", MAIN, "--device", "cpu"]
            command += ["--dummy", "100000", "--image-size", "32", "-b", "2", "-p", "1", "--stop-step-num", str(steps)]
            command += ["--multiprocessing-distributed", "--device-list", "0", "--world-size", str(NODES)]
            command += ["--rank", str(node), "--addr", nodes.address(0)]
            command += ["--output-dir", os.path.join(folder, str(node))]
            output = subprocess.PIPE if node == 0 else subprocess.DEVNULL
            children.append(subprocess.Popen([*command, *flags], env=environment, text=True, stdout=output))
        marks = []  # (bytes, time) when the line of each step is printed; the next step has sent nothing yet
        for line in children[0].stdout or ():
            if line.startswith("Epoch:"):
                marks.append((bytes_sent(nodes, 0), time.perf_counter()))
        codes = [child.wait() for child in children]
        if any(codes):
            raise RuntimeError("main.py failed")
    marks = marks[WARM_UP_STEPS:]
    return [(after[0] - before[0], after[1] - before[1]) for before, after in zip(marks, marks[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 10, 1], metavar="GBIT", help="0: no limit")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("flags", nargs="*", help="flags of main.py, after --, measured in addition to the plain run")
    args = parser.parse_args()
    with network(NODES) as nodes:
        for rate in args.rates:
            limit_rate(nodes, rate)
            for flags in [[], args.flags] if args.flags else [[]]:
                steps = measure(nodes, args.steps, flags)
                seconds = sorted(seconds for _, seconds in steps)
                result = {
                    "gigabits": rate or "bare",
                    "flags": " ".join(flags),
                    "steps": len(steps),
                    "megabytes_per_step": round(statistics.median(count for count, _ in steps) / 1e6, 1),
                    "seconds_per_step": round(statistics.median(seconds), 3),
                    "fastest": round(seconds[0], 3),
                    "slowest": round(seconds[-1], 3),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except NamespaceError as error:
        sys.exit(f"wire.py: error: {error}")
