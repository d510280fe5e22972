# SPDX-License-Identifier: BSD-3-Clause
"""Processes that meet in any order, late, twice or never. Real processes over TCP."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from typing import Any

from engine.parallel import free_port
from engine.versions import TORCH

from helpers.program import environment, run_main, start_main

import pytest

JOIN = """
import sys
from engine.parallel import Ranks, rendezvous
from engine.console import exit_process
from engine.errors import RendezvousError
from engine.signals import StopSignals
rendezvous.REPORT_SECONDS = 0.5
stop = StopSignals()
print("started", flush=True)
ranks = Ranks(int(sys.argv[2]), int(sys.argv[3]), 0, 1)
try:
    store = rendezvous.meet(sys.argv[1], ranks, float(sys.argv[4]))
    print("met", flush=True)
    sys.stdin.readline()  # rank 0 holds the store: keep it until all have met
except RendezvousError as error:
    print(error, flush=True)
    exit_process(2)
exit_process(0)
"""


class Joining:
    """A process that joins a rendezvous."""

    def __init__(self, url: str, rank: int, world_size: int, timeout: float = 60, code: str = JOIN) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, url, str(rank), str(world_size), str(timeout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            universal_newlines=True,
            env=environment(),
        )
        assert self.read() == "started"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip()

    def read_until(self, start: str) -> str:
        line = self.read()
        while not line.startswith(start):
            assert line.startswith("=> waiting"), line
            line = self.read()
        return line

    def finish(self) -> int:
        self.process.communicate("\n", timeout=30)
        return self.process.returncode


@pytest.fixture
def url():
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["rank 0 first", "rank 0 last"])
def test_processes_meet_in_any_order_and_name_who_is_missing(url, order):
    joined = []
    for rank in order:
        joined.append(Joining(url, rank, 3))
        if len(joined) < 3:
            line = joined[0].read()
            missing = "node 0 (rank 0)" if order[0] == 2 else ", ".join(f"node {i} (rank {i})" for i in range(1, 3))
            assert line.startswith("=> waiting for ") and " of 3 nodes: " in line and " s of 60 s" in line, line
            if len(joined) == 1:
                assert missing in line, line
    for process in joined:
        process.read_until("met")
    assert [process.finish() for process in joined] == [0, 0, 0]


def test_a_process_that_does_not_come_is_named_at_the_end(url):
    alone = Joining(url, 0, 2, timeout=2)
    assert "node 1 (rank 1) did not join within 2 s" in alone.read_until("tcp"), alone
    assert alone.finish() == 2
    alone = Joining(url, 1, 2, timeout=2)
    assert "node 0 (rank 0) did not join within 2 s" in alone.read_until("tcp")
    assert alone.finish() == 2


def test_a_rank_taken_twice_is_named_on_every_process_at_once(url):
    """The third process has not come yet, and need not."""
    processes = [Joining(url, rank, 3) for rank in (0, 1)]
    processes[1].read()  # it waits
    processes.append(Joining(url, 1, 3))
    begin = time.monotonic()
    for process in processes:
        assert "two processes are rank 1" in process.read_until("tcp")
        assert process.finish() == 2
    assert time.monotonic() - begin < 30


def test_different_world_sizes_are_named_at_once(url):
    processes = [Joining(url, 0, 3), Joining(url, 1, 2)]
    for process in processes:
        assert "different world sizes: 2 on rank" in process.read_until("tcp")
        assert process.finish() == 2


def test_a_process_that_is_stopped_while_waiting_exits_with_75_and_can_come_back(url):
    first = Joining(url, 0, 3)
    second = Joining(url, 1, 3)
    second.read()  # it waits
    second.process.send_signal(signal.SIGTERM)
    assert second.finish() == 75
    processes = [first, Joining(url, 1, 3), Joining(url, 2, 3)]
    for process in processes:
        process.read_until("met")
    assert [process.finish() for process in processes] == [0, 0, 0]


def test_rank_0_can_come_back_while_others_wait(url):
    second, first = Joining(url, 1, 3), Joining(url, 0, 3)
    first.read()
    first.process.kill()
    first.finish()
    processes = [Joining(url, 0, 3), second, Joining(url, 2, 3)]
    for process in processes:
        process.read_until("met")
    assert [process.finish() for process in processes] == [0, 0, 0]


def test_a_port_in_use_is_named_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        result = run_main("--world-size", 2, "--rank", 0, "--dist-url", url, "--output-dir", tmp_path, timeout=60)
    assert result.code == 2 and f"{url}: the port is in use" in result.err, result.err
    assert len(result.err.splitlines()) == 1


def test_an_address_of_another_host_is_named_at_once(tmp_path):
    url = f"tcp://192.0.2.1:{free_port()}"  # TEST-NET-1, RFC 5737
    result = run_main("--world-size", 2, "--rank", 0, "--dist-url", url, "--output-dir", tmp_path, timeout=60)
    assert result.code == 2 and "192.0.2.1 is not an address of this host" in result.err, result.err


# A process of a job that has met, or cannot.
JOB = """
import sys
from engine.parallel import Communicator, Ranks
from engine.console import exit_process
from engine.errors import RendezvousError
ranks = Ranks(int(sys.argv[2]), int(sys.argv[3]), 0, 1)
print("started", flush=True)
try:
    comm = Communicator(ranks, "gloo", sys.argv[1], timeout=float(sys.argv[4]), report=print)
except RendezvousError as error:
    print(error, flush=True)
    exit_process(2)
print("met", flush=True)
sys.stdin.readline()
comm.close()
exit_process(0)
"""


def test_a_duplicate_of_a_job_that_runs_is_refused_and_the_job_goes_on(url):
    processes = [Joining(url, rank, 2, code=JOB) for rank in (0, 1)]
    assert [process.read() for process in processes] == ["met", "met"]
    late = Joining(url, 1, 2, code=JOB)
    assert "the job has started already, with another process of rank 1" in late.read()
    assert late.finish() == 2
    for process in processes:
        process.process.stdin.write("\n")
        process.process.stdin.flush()
    assert [process.finish() for process in processes] == [0, 0]


@pytest.mark.skipif(TORCH < (2, 0), reason="TCPStore of older torch holds Python's lock while it waits")
def test_something_else_that_answers_on_the_port_is_not_waited_for_without_end(url):
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        silent.listen(9)
        process = Joining(url, 1, 2, timeout=3)
        assert "node 0 (rank 0) did not join within 3 s" in process.read_until("tcp")
        assert process.finish() == 2


def test_a_checkpoint_that_rank_0_does_not_have_is_no_fresh_start(folder: str, tmp_path: Any) -> None:
    url = f"tcp://127.0.0.1:{free_port()}"
    flags = [
        folder,
        "--arch",
        "vgg11",
        "--image-size",
        32,
        "-b",
        6,
        "--epochs",
        1,
        "--world-size",
        2,
        "--dist-url",
        url,
    ]
    nodes = [
        start_main(*flags, "--rank", 0, "--output-dir", tmp_path / "0"),
        start_main(*flags, "--rank", 1, "--output-dir", tmp_path / "1", "--resume", "checkpoint.pth.tar"),
    ]
    for node in nodes:
        err = node.communicate(timeout=60)[1]
        assert node.returncode == 2 and "rank 0, which reads it, has none: give it to rank 0" in err, err


def test_env_url_without_its_variables_names_them(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    result = run_main("--world-size", 2, "--rank", 0, "--dist-url", "env://", "--output-dir", tmp_path)
    assert result.code == 2 and "env:// requires MASTER_ADDR and MASTER_PORT" in result.err, result.err
