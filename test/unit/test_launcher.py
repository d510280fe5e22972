# SPDX-License-Identifier: BSD-3-Clause
"""Who runs where, and starting, stopping and losing processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

from engine.errors import UsageError
from engine.parallel import launcher
from engine.parallel.launcher import Report, free_port, resolve_topology
from helpers.program import (
    SMALL_MAIN,
    TWO,
    assert_same_weights,
    children_of,
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


def topology(**changes):
    options = {
        "multiprocessing_distributed": False,
        "world_size": -1,
        "rank": -1,
        "addr": "127.0.0.1",
        "dist_url": None,
        "devices": 4,
    }
    return resolve_topology(**{**options, **changes})


def test_flags_describe_nodes_and_processes():
    alone = topology()
    assert (alone.nodes, alone.node_rank, alone.processes, alone.spawn) == (1, 0, 1, False)
    nodes = topology(multiprocessing_distributed=True, world_size=3, rank=2, addr="10.0.0.1")
    assert (nodes.nodes, nodes.node_rank, nodes.processes, nodes.spawn) == (3, 2, 4, True)
    assert nodes.dist_url == "tcp://10.0.0.1:59629"
    # The reference's scripts pass a loopback URL and the real address beside it.
    assert topology(addr="10.0.0.1", dist_url="tcp://127.0.0.1:50000", world_size=2, rank=0).dist_url == (
        "tcp://10.0.0.1:50000"
    )
    assert topology(dist_url="tcp://[::1]:50000").dist_url == "tcp://[::1]:50000"
    with pytest.raises(UsageError, match="--rank 2 does not fit --world-size 2"):
        topology(world_size=2, rank=2)


def test_torchruns_variables_describe_nodes_and_processes(monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    job = topology(multiprocessing_distributed=True)
    assert (job.nodes, job.node_rank, job.processes, job.dist_url, job.spawn) == (3, 2, 2, "env://", False)


@pytest.mark.parametrize("name, value", [("RANK", None), ("RANK", "x"), ("LOCAL_WORLD_SIZE", "0"), ("LOCAL_RANK", "")])
def test_a_variable_of_torchrun_that_is_wrong_is_named(monkeypatch, name, value):
    variables = {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", name: value}
    for variable, text in variables.items():
        monkeypatch.delenv(variable, raising=False)
        if text is not None:
            monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"the variable {name} must be at least"):
        topology()


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


# --- what the launcher makes of its processes' ends -------------------------------------------------------------------


class EndedChild:
    """A child that has exited with a code, and the pipe with its report."""

    def __init__(self, exitcode: int, report: Report | None = None) -> None:
        self.exitcode = exitcode
        self.sentinel, write = os.pipe()
        os.close(write)  # ready at once, as a dead process's sentinel is
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        if report is not None:
            sender.send(report)
        sender.close()

    def join(self) -> None:
        pass


PEER = Report("main.py: error: rendezvous failed\n", 2, about_peers=True)
USER = Report("main.py: error: no such folder\n", 2)
CRASH = Report("Traceback …\n")


@pytest.mark.parametrize(
    "ends, code, text",
    [
        # Rank 0 stops on the signal while rank 1 waits for it: rank 1's failure is only a consequence.
        ([(75, None), (2, PEER)], 75, ""),
        ([(2, PEER), (75, None)], 75, "a process was stopped by a signal; there was nothing to save"),
        ([(2, PEER), (2, PEER)], 2, PEER.text),
        ([(1, CRASH), (2, USER)], 2, USER.text),
        ([(1, CRASH), (2, PEER)], 1, CRASH.text),
        ([(75, None), (2, USER)], 2, USER.text),
        # A process that has stopped does not hide the failure of another.
        ([(75, None), (1, CRASH)], 1, CRASH.text),
        ([(75, None), (-9, None)], 137, "the process of rank 1 was killed by signal 9"),
        ([(0, None), (0, None)], 0, ""),
        (
            [(-9, None), (1, Report(PEER.text, None, about_peers=True))],
            137,
            "the process of rank 0 was killed by signal 9",
        ),
    ],
)
def test_the_cause_of_a_failure_is_reported_and_not_its_consequences(capsys, ends, code, text):
    children = [EndedChild(exitcode, report) for exitcode, report in ends]
    assert launcher._wait_for(children, [child.receiver for child in children], 0) == code
    err = capsys.readouterr().err
    assert text in err and len(err.splitlines()) == bool(text), err


BIG_REPORT = """
import argparse, sys
from engine.parallel.launcher import Topology, launch

def worker(args, report):
    raise ValueError("图" * 100000)

if __name__ == "__main__":
    sys.exit(launch(worker, argparse.Namespace(), Topology(1, 0, 1, "tcp://127.0.0.1:1", spawn=True)))
"""


def test_an_error_longer_than_a_pipe_is_reported(tmp_path):
    script = tmp_path / "big.py"
    script.write_text(BIG_REPORT, encoding="utf-8")
    result = run(sys.executable, script, timeout=60, env={"PYTHONIOENCODING": "utf-8"})
    assert result.code == 1 and "图图图" in result.err
