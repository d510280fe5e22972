# SPDX-License-Identifier: BSD-3-Clause
"""Starting, stopping and losing processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from engine.parallel import free_port

from helpers.program import (
    SMALL_MAIN,
    TWO,
    assert_same_weights,
    children_of,
    environment,
    is_alive,
    run,
    run_main,
    start_main,
    wait_for_line,
    weights,
)

import pytest

SMALL = ["--arch", "vgg11", "--image-size", "32", "--lr", "0.01"]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which processes live")


def test_torchrun_runs_the_same_program(folder, tmp_path):
    pytest.importorskip("torch.distributed.run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()]
    flags = [folder, *SMALL, "-b", 6, "--epochs", 1]
    result = run(*torchrun, SMALL_MAIN, "--device", "cpu", *flags, "--output-dir", tmp_path)
    assert result.code == 0, result.err
    assert result.out.count("FPS@all") == 1
    spawned = tmp_path / "spawned"
    assert run_main(*flags, *TWO, "--output-dir", spawned).code == 0
    assert_same_weights(*(weights(path / "checkpoint.pth.tar") for path in (tmp_path, spawned)))


def test_processes_started_by_hand_meet(folder, tmp_path):
    flags = [folder, *SMALL, "-b", "3", "--epochs", "1", "--world-size", "2"]
    flags += ["--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    children = [start_main(*flags, "--rank", rank, "--output-dir", tmp_path / str(rank)) for rank in (0, 1)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all("FPS@all" in output for output in outputs)
    assert (tmp_path / "0" / "checkpoint.pth.tar").exists() and not (tmp_path / "1" / "checkpoint.pth.tar").exists()


@linux_only
@pytest.mark.parametrize("victim", ["loader worker", "parent"])
def test_a_killed_loader_worker_is_one_line_and_no_process_is_left(tmp_path, victim):
    flags = ["--arch", "vgg11", "-b", 32, "-j", 2, "--epochs", 100000, "--eval-freq", 100000, "-p", 1]
    parent = start_main(*flags, "--output-dir", tmp_path)
    wait_for_line(parent, "Epoch")
    workers = children_of(parent.pid)
    assert len(workers) == 2
    os.kill(parent.pid if victim == "parent" else workers[1], signal.SIGKILL)
    err = parent.communicate(timeout=60)[1]
    if victim == "loader worker":
        assert parent.returncode == 1 and err.startswith("main.py: error: a DataLoader worker exited unexpectedly"), err
        assert len(err.splitlines()) == 1, err
    deadline = time.monotonic() + 20
    while any(map(is_alive, workers)):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


@linux_only
def test_a_signal_to_a_job_that_is_starting_exits_with_75(tmp_path):
    """The processes are still importing torch: they have nothing to save, and say so once."""
    process = start_main("--arch", "vgg11", "--output-dir", tmp_path, *TWO)
    try:
        while len(children_of(process.pid)) < 3:  # one of them is multiprocessing's own
            assert process.poll() is None
            time.sleep(0.01)
        ranks = children_of(process.pid)[1:]
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 75 and not any(map(is_alive, ranks))
    assert len(err.splitlines()) == 1 and "there was nothing to save" in err, err
    assert not (tmp_path / "checkpoint.pth.tar").exists()


BIG_REPORT = """
import sys
from engine.parallel import Topology, launch

def worker(ranks, report):
    raise ValueError("图" * 100000)

if __name__ == "__main__":
    sys.exit(launch(worker, Topology(1, 0, 1, "tcp://127.0.0.1:1", spawn=True)))
"""


def test_an_error_longer_than_a_pipe_is_reported(tmp_path):
    script = tmp_path / "big.py"
    script.write_text(BIG_REPORT, encoding="utf-8")
    result = run(sys.executable, script, timeout=60, env={"PYTHONIOENCODING": "utf-8"})
    assert result.code == 1 and "图图图" in result.err


SUSPENDED = """
import os, sys, time
from engine import console
from engine.parallel import Communicator, Topology, launch
from engine.parallel.heartbeat import Heartbeat

Heartbeat.INTERVAL, Heartbeat.PATIENCE = 1, 9  # seconds; here and in each process, which imports this file

def worker(ranks, report):
    comm = Communicator(ranks, "gloo", sys.argv[1], 60, report)
    assert os.environ["RANK"] == str(comm.rank) and os.environ["LOCAL_WORLD_SIZE"] == "2"
    comm.barrier()
    console.result(f"rank {comm.rank} is {os.getpid()}")
    while True:
        comm.barrier()
        time.sleep(0.1)

if __name__ == "__main__":
    console.run_script(lambda: launch(worker, Topology(1, 0, 2, sys.argv[1], spawn=True)))
"""


@linux_only
@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_process_of_this_node_is_killed_when_the_heartbeat_has_lost_it(tmp_path, rank):
    """The heartbeat takes nine seconds here, the launcher a few more: it does not add its 30 seconds of grace."""
    script = tmp_path / "suspended.py"
    script.write_text(SUSPENDED)
    command = [sys.executable, str(script), f"tcp://127.0.0.1:{free_port()}"]
    job = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment()
    )
    try:
        lines = sorted(job.stdout.readline() for _ in range(2))
        pids = [int(line.split()[-1]) for line in lines]
        begin = time.monotonic()
        os.kill(pids[rank], signal.SIGSTOP)
        err = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 1 and time.monotonic() - begin < 30
    assert f"rank {rank} is unreachable" in err and len(err.splitlines()) == 1, err
    assert not any(map(is_alive, pids))


def test_processes_of_a_kubernetes_operator_meet(folder, tmp_path):
    """One process per node, with WORLD_SIZE, RANK and the address in the environment, but no LOCAL_RANK."""
    flags = [folder, *SMALL, "-b", "3", "--epochs", "1", "--dist-url", "env://"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in ("0", "1"):
        command = [sys.executable, SMALL_MAIN, "--device", "cpu", *flags, "--output-dir", str(tmp_path / rank)]
        env = environment(RANK=rank, **variables)
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True, env=env))
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all("=> vgg11 on 2 × cpu" in output for output in outputs), outputs
    assert (tmp_path / "0" / "checkpoint.pth.tar").exists() and not (tmp_path / "1" / "checkpoint.pth.tar").exists()
