# SPDX-License-Identifier: BSD-3-Clause
"""Signals, lost processes and lost connections: the other processes must save or exit, and say why in one line."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

from engine.parallel import free_port

from helpers import namespaces

from jobs import (
    COMMON,
    ENDLESS,
    SECONDS_TO_EXIT,
    SMALL,
    TWO_PROCESSES,
    Job,
    checksum,
    error_lines,
    intact_step,
    make_folder,
    require,
    run,
    start_nodes,
    train,
)


def signals(folder: str) -> int:
    """SIGTERM, SIGINT and SIGUSR1 to the launcher, to a rank, to all; during training, validation and start-up."""
    base = ["-b", 32, "--epochs", 2, "--save-freq", 1, "-p", 1, *TWO_PROCESSES]
    undisturbed = make_folder(folder, "undisturbed")
    run(*base, folder=undisturbed)
    tries = 0
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    moments = [("Epoch: [0]", 3), ("Test:", 2), ("Epoch: [1]", 3)]
    for target in ("launcher", "rank", "all"):
        stopped = make_folder(folder, f"stopped {target}")
        for position, (text, times) in enumerate(moments):
            number = numbers[(tries + position) % 3]
            job = train(*base, "--auto-resume", folder=stopped)
            job.wait_for(text, times=times)
            begin = time.monotonic()
            if target == "all":
                os.killpg(job.child.pid, number)
            else:
                os.kill(job.child.pid if target == "launcher" else job.children()[-1], number)
            code, seconds = job.wait(), time.monotonic() - begin
            print(f"  {number.name} to {target} at {text!r}: exit code {code} after {seconds:.1f} s", flush=True)
            assert code == 75 and seconds < 10 and not error_lines(job.output()), job.output()[-2000:]
            intact_step(stopped)
            tries += 1
        run(*base, "--auto-resume", folder=stopped)
        assert checksum(stopped) == checksum(undisturbed)
    for delay in (0, 1, 2, 4, 8):  # seconds; the first step is taken after some 4 s
        job = train(*base, "--epochs", 100000, folder=make_folder(folder, f"starting {delay}"))
        while len(job.children()) < 2:
            time.sleep(0.01)
        time.sleep(delay)
        os.killpg(job.child.pid, signal.SIGTERM)
        code = job.wait()
        print(f"  SIGTERM to all {delay} s after the ranks started: exit code {code}", flush=True)
        assert code == 75 and not error_lines(job.output()), (code, job.output())
        tries += 1
    return tries


def second_signal(folder: str) -> int:
    """Rank 1 is suspended, so rank 0 cannot finish its step: it waits after one signal, and exits after a later one."""
    jobs = start_nodes(folder, 2)
    jobs[0].wait_for("Epoch", times=3)
    os.kill(jobs[1].child.pid, signal.SIGSTOP)
    try:
        time.sleep(1)
        os.kill(jobs[0].child.pid, signal.SIGTERM)
        time.sleep(1)
        os.kill(jobs[0].child.pid, signal.SIGTERM)  # within two seconds: part of the same request
        time.sleep(1.5)
        assert jobs[0].child.poll() is None, jobs[0].output()
        begin = time.monotonic()
        os.kill(jobs[0].child.pid, signal.SIGTERM)
        assert jobs[0].wait(10) == 128 + signal.SIGTERM and time.monotonic() - begin < 5
    finally:
        jobs[1].kill()
    return 1


def check_lost(jobs: list[Job], lost: dict[int, int], what: str) -> None:
    """Each rank in `lost` must exit with code 1 within a minute, and its only error line must name the lost rank.

    lost: {rank: the rank that it cannot reach}.
    """
    begin = time.monotonic()
    for rank, peer in lost.items():
        code = jobs[rank].wait(begin + SECONDS_TO_EXIT - time.monotonic())
        lines = error_lines(jobs[rank].output())
        print(f"  {what}: rank {rank}: exit code {code} after {time.monotonic() - begin:.0f} s: {lines}", flush=True)
        assert code == 1 and len(lines) == 1 and f"rank {peer} is unreachable" in lines[0], jobs[rank].output()[-3000:]


def lost_ranks(folder: str) -> int:
    tries = 0
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for count, lost in ((3, 1), (2, 0)):
            jobs = start_nodes(folder, count)
            try:
                jobs[0].wait_for("Epoch", times=3)
                os.kill(jobs[lost].child.pid, number)
                check_lost(jobs, {rank: lost for rank in range(count) if rank != lost}, number.name)
                tries += 1
            finally:
                for job in jobs:
                    job.kill()
    return tries


def network(folder: str) -> int:
    """Two network namespaces; the bridge between them drops all packets of one."""
    interface = f"GLOO_SOCKET_IFNAME={namespaces.INTERFACE}"
    with namespaces.network(2) as net:
        prefixes = [[*net.command(rank), "env", interface] for rank in range(2)]
        jobs = start_nodes(folder, 2, net.address(0), prefixes)
        try:
            jobs[0].wait_for("Epoch", times=3)
            net.drop_packets(1)
            check_lost(jobs, {0: 1, 1: 0}, "disconnected")
        finally:
            for job in jobs:
                job.kill()
    return 1


def any_process(folder: str) -> int:
    """SIGKILL to the launcher, a rank, a DataLoader worker: no other process is left, and one line says why."""
    tries = 0
    for victim, expected in (("launcher", -9), ("rank 0", 137), ("rank 1", 137), ("worker", 1)):
        job = train(*ENDLESS, *TWO_PROCESSES, "-j", 4, folder=folder)
        job.wait_for("Epoch", times=3)
        time.sleep(0.5)
        ranks = [pid for pid in job.children() if len(job.children(pid)) == 2]  # those with two workers
        assert len(ranks) == 2, (ranks, job.processes())
        worker = job.children(ranks[1])[0]
        pids = {"launcher": job.child.pid, "rank 0": ranks[0], "rank 1": ranks[1], "worker": worker}
        begin = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        code, lines = job.wait(), error_lines(job.output())
        print(f"  {victim}: exit code {code} after {time.monotonic() - begin:.0f} s: {lines}", flush=True)
        assert code == expected and len(lines) == int(victim != "launcher"), (code, job.output()[-3000:])
        if victim.startswith("rank"):
            assert victim in lines[0], lines
        if victim == "worker":
            assert "a DataLoader worker exited unexpectedly" in lines[0], lines
        tries += 1
    return tries


def torchrun(folder: str) -> int:
    """--max-restarts: two workers are killed, and the job continues by itself; then torchrun itself is killed."""
    require(importlib.util.find_spec("torch.distributed.run"), "torch 1.9")
    tries = 0
    for backend in ("static", "c10d"):
        own = make_folder(folder, backend)
        port = free_port()
        if backend == "static":
            rendezvous = ["--master-port", port]
        else:
            rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 3, *rendezvous]
        flags = [*COMMON, *ENDLESS, "--save-freq", 5, "--auto-resume", "--output-dir", own]
        job = Job(*launcher, SMALL, *flags, folder=own)
        for restarts, rank in enumerate((1, 0)):
            job.wait_for("Epoch", times=12 + job.output().count("Epoch"))
            begin = time.monotonic()
            os.kill(job.children()[rank], signal.SIGKILL)
            job.wait_for("=> resuming from", times=restarts + 1)
            print(f"  rank {rank} killed: resumed by itself after {time.monotonic() - begin:.0f} s", flush=True)
            tries += 1
        job.wait_for("Epoch", times=2 + job.output().count("Epoch"))
        assert "rendezvous failed" not in job.output() and "Traceback" not in job.output(), job.output()[-5000:]
        job.child.kill()
        job.wait()
        tries += 1
    return tries
