# SPDX-License-Identifier: BSD-3-Clause
"""What the control plane costs: milliseconds that a step loses to the stop vote, seconds to meet, seconds to end.

    python bench/control_plane.py --processes 1 2 8 32 64

Tiny processes on this host, joined by gloo; a step is a sleep. Three kinds of steps in turn, A B C A B C …: without a
vote, with a vote that is waited for, and with main.py's vote, which is counted one step later. Medians over the turns,
on rank 0. With more processes than cores, the times include the waiting for a core: compare the columns. Then one
process is killed, and all others must end. The last line is JSON. Requires Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from engine.console import exit_process
from engine.parallel import Communicator, Ranks, free_port

import torch

KINDS = ("no vote", "vote waited for", "vote one step later")


def run_steps(comm: Communicator, kind: str, steps: int, seconds: float) -> float:
    """Return the milliseconds per step."""
    comm.barrier()
    vote, begin = comm.stop_vote(), time.perf_counter()
    for _ in range(steps):
        time.sleep(seconds)
        if kind == "vote waited for":
            comm.any(False)
        elif kind == "vote one step later":
            vote.vote(False)
    vote.result()
    return 1e3 * (time.perf_counter() - begin) / steps


def work(url: str, args: argparse.Namespace) -> None:
    """Be one process of the job; rank 0 prints its result as JSON, then all wait to be ended."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    ranks = Ranks(args.rank, args.world_size, args.rank, args.world_size)
    comm = Communicator(ranks, "gloo", url, timeout=600, report=lambda text, rank: None)
    met = time.perf_counter() - begin
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(args.turns + 1):
        for kind in KINDS:
            milliseconds = run_steps(comm, kind, args.steps, args.step_ms / 1e3)
            if turn:  # the first one warms up
                times[kind].append(milliseconds)
    if comm.rank == 0:
        result = {kind: round(statistics.median(values), 3) for kind, values in times.items()}
        print(json.dumps({"seconds_to_meet": round(met, 2), "milliseconds_per_step": result}), flush=True)
    if comm.world_size == 1:
        exit_process(0)
    time.sleep(600)


def measure(count: int, args: argparse.Namespace) -> dict:
    command = [sys.executable, os.path.abspath(__file__), "--url", f"tcp://127.0.0.1:{free_port()}"]
    command += ["--steps", str(args.steps), "--turns", str(args.turns), "--step-ms", str(args.step_ms)]
    children = []
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    for rank in range(count):
        ranks = ["--rank", str(rank), "--world-size", str(count)]
        output = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        children.append(subprocess.Popen([*command, *ranks], env=env, stdout=output, universal_newlines=True))
    assert children[0].stdout is not None
    line = next(line for line in children[0].stdout if line.startswith("{"))
    result = {"processes": count, **json.loads(line)}
    if count > 1:
        begin = time.perf_counter()
        children[-1].send_signal(signal.SIGKILL)
    for child in children:
        child.wait()
    if count > 1:
        result["seconds_to_end"] = round(time.perf_counter() - begin, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 8, 32, 64])
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--step-ms", type=float, default=50, help="length of a step")
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world-size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.url:
        work(args.url, args)
        return
    results = []
    for count in args.processes:
        results.append(measure(count, args))
        print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"torch": torch.__version__, "cores": os.cpu_count(), "results": results}))


if __name__ == "__main__":
    main()
