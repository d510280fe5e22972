# SPDX-License-Identifier: BSD-3-Clause
"""How processes meet, agree and fail together, in real processes over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

from engine.parallel import free_port

from helpers.program import environment, run, start_main, wait_for_line

import pytest

PREAMBLE = """
import os, sys
from engine.device import Amp, ComputeDevice
from helpers.step import optimizer_of
from engine.parallel import Communicator, Ranks
from engine.console import exit_process
from engine.errors import DivergedError, UsageError
import torch
"""


def run_job(code: str, tmp_path, world_size: int = 2) -> list[str]:
    """Run `check(comm)` of the code in the processes of one job. Returns what each printed."""
    script = tmp_path / "check.py"
    script.write_text(
        PREAMBLE
        + textwrap.dedent(code)
        + "\nranks = Ranks(*map(int, sys.argv[2:]))"
        + "\ncomm = Communicator(ranks, 'gloo', sys.argv[1], timeout=60, report=print)"
        + "\ncheck(comm)\ncomm.close()\nexit_process(0)\n"
    )
    url = f"tcp://127.0.0.1:{free_port()}"
    children = []
    for rank in range(world_size):
        ranks = [str(number) for number in (rank, world_size, rank, world_size)]
        children.append(
            subprocess.Popen(
                [sys.executable, str(script), url, *ranks],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
            )
        )
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * world_size, outputs
    return [out for out, _ in outputs]


def test_values_reach_every_process_unchanged(tmp_path):
    outputs = run_job(
        """
        def check(comm):
            state = {'a': torch.arange(6.).view(2, 3).t(), 'b': [1, 'x', None, {'c': torch.tensor(7)}]}
            state['empty'] = torch.zeros(0)
            got = comm.broadcast(state if comm.rank == 0 else None)
            assert torch.equal(got['a'], state['a']) and got['b'][:3] == [1, 'x', None], got
            assert int(got['b'][3]['c']) == 7 and got['empty'].numel() == 0
            assert comm.any(comm.rank == 1) and not comm.any(False)
            assert comm.sum([1, 2.5]) == [2.0, 5.0]
            import numpy as np
            array = np.array([-1, 5 * comm.rank, 3])
            comm.max_(array)
            assert array.tolist() == [-1, 5, 3]
            print('same')
        """,
        tmp_path,
    )
    assert outputs == ["same\n", "same\n"]


def test_different_flags_and_decoders_are_refused_on_every_process(tmp_path):
    outputs = run_job(
        """
        def check(comm):
            comm.check_same({'--batch-size': 8, 'the JPEG decoder': 'Pillow'})
            decoder = ['simplejpeg', 'Pillow'][comm.rank]
            for name, value in (('--batch-size', 8 + comm.rank), ('the JPEG decoder', decoder)):
                try:
                    comm.check_same({'--epochs': 1, name: value})
                except UsageError as error:
                    print(error)
        """,
        tmp_path,
    )
    assert "--batch-size is 9 here and 8 on rank 0" in outputs[1]
    assert "the JPEG decoder is Pillow here and simplejpeg on rank 0" in outputs[1]
    assert outputs[0].count("the nodes were started differently") == 2


@pytest.mark.parametrize("altered", [False, True])
def test_parameters_that_differ_by_one_bit_are_noticed_on_both_processes(tmp_path, altered):
    outputs = run_job(
        f"""
        def check(comm):
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(20, 5))
            if {altered} and comm.rank == 1:
                with torch.no_grad():
                    network[1].bias[3] *= 1 + 2 ** -20
            try:
                comm.check_same_parameters(network)
                print('same')
            except DivergedError as error:
                print('different', 'rank 1 is one' in str(error))
        """,
        tmp_path,
    )
    assert outputs == (["different False\n", "different True\n"] if altered else ["same\n", "same\n"])


def test_a_non_finite_gradient_on_one_process_skips_the_step_on_both(tmp_path):
    outputs = run_job(
        """
        def check(comm):
            device = ComputeDevice('cpu', local_world_size=2)
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
            optimizer = optimizer_of(network, Amp(device))
            model = torch.nn.parallel.DistributedDataParallel(network, **device.ddp_options())
            changed, skipped = [], []
            for step in range(5):
                before = [value.clone() for value in network.state_dict().values()]
                factor = {1: float('nan'), 3: float('inf')}.get(step, 1.0) if comm.rank == 1 else 1.0
                optimizer.backward((model(torch.randn(6, 4) * factor) ** 2).mean())
                optimizer.step()
                skipped.append(int(optimizer.skipped_in_a_row.item()))
                after = list(network.state_dict().values())
                changed.append(not all(torch.equal(old, new) for old, new in zip(before[:2], after[:2])))
                assert all(torch.isfinite(value.float()).all() for value in after)
            comm.check_same_parameters(network)
            print(changed, max(skipped))
        """,
        tmp_path,
    )
    assert outputs == ["[True, False, True, False, True] 1\n"] * 2


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stalls_ends_the_others_within_a_minute(folder, tmp_path, number):
    """Two nodes started by hand, each its own launcher, so that only the network tells of the death."""
    url = f"tcp://127.0.0.1:{free_port()}"
    flags = [folder, "--arch", "vgg11", "--image-size", "32", "--lr", "0.01", "-b", "3", "--epochs", "1000"]
    flags += ["--eval-freq", "1000", "-p", "1", "--world-size", "2", "--dist-url", url]
    children = [start_main(*flags, "--rank", rank, "--output-dir", tmp_path / str(rank)) for rank in (0, 1)]
    try:
        wait_for_line(children[0], "Epoch")
        children[1].send_signal(number)
        begin = time.monotonic()
        err = children[0].communicate(timeout=60)[1]
        assert children[0].returncode not in (0, 75) and time.monotonic() - begin < 60
        assert err.startswith("main.py: error: rank 1 is unreachable (exited, suspended or disconnected)"), err
        assert len(err.splitlines()) == 1, err
    finally:
        children[1].kill()
        children[1].communicate()


FAILING = """
import sys, time
from engine.parallel import Communicator, Ranks
from engine.console import exit_process
import torch

rank = int(sys.argv[2])
comm = Communicator(Ranks(rank, 2, 0, 1), "gloo", sys.argv[1], timeout=60, report=lambda text, rank: print(text))
print("met", flush=True)
try:
    if sys.argv[3] == "local" and rank == 1:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    while True:
        comm.any(False)
        time.sleep(0.1)
except RuntimeError as error:
    comm.fail(error)
    print("local", type(error).__name__)
    exit_process(1)
"""


@pytest.mark.parametrize("cause", ["local", "peer"])
def test_an_error_is_local_while_the_others_beat_and_a_lost_peer_when_one_does_not(cause):
    url = f"tcp://127.0.0.1:{free_port()}"
    children = []
    for rank in ("0", "1"):
        command = [sys.executable, "-u", "-c", FAILING, url, rank, cause]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True, env=environment()))
    try:
        for child in children:
            wait_for_line(child, "met")
        begin = time.monotonic()
        if cause == "peer":
            children[1].kill()
        outputs = [children[1].communicate(timeout=60)[0]]
        seconds = time.monotonic() - begin
        outputs.insert(0, children[0].communicate(timeout=60)[0])
        assert outputs[0].startswith("rank 1 is unreachable"), outputs
        assert outputs[1] == ("local RuntimeError\n" if cause == "local" else ""), outputs
        assert seconds < 12 and time.monotonic() - begin < 30
    finally:
        for child in children:
            child.kill()


def test_a_process_that_lost_another_exits_even_if_it_cannot_say_so():
    code = """
        import threading
        from engine.parallel.heartbeat import Heartbeat

        def report(text, rank):
            raise OSError("no space left on the disk")

        heartbeat = object.__new__(Heartbeat)
        heartbeat.rank, heartbeat.failed, heartbeat.report, heartbeat.stopped = 1, False, report, threading.Event()
        threading.Thread(target=heartbeat._end, args=(0,)).start()
        threading.Event().wait(60)
    """
    begin = time.monotonic()
    assert run(sys.executable, "-c", textwrap.dedent(code)).code == 1
    assert time.monotonic() - begin < 30
