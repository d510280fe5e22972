# SPDX-License-Identifier: BSD-3-Clause
"""How processes meet, agree and fail together, in real processes over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time

from engine.parallel.launcher import free_port
from helpers.program import environment, run, start_main, wait_for_line

import pytest

PREAMBLE = """
import os, sys
from engine.parallel import communicator as distributed
from engine.device.compute import ComputeDevice
from engine.parallel.communicator import Communicator, check_same_flags, check_same_parameters
from engine.console import exit_process
from engine.errors import DivergedError, UsageError
import torch
"""


def run_group(code: str, tmp_path, world_size: int = 2) -> list[str]:
    """Run `check(group)` of the code in the processes of one job. Returns what each printed."""
    script = tmp_path / "check.py"
    script.write_text(
        PREAMBLE
        + textwrap.dedent(code)
        + "\ngroup = Communicator('gloo', sys.argv[1], timeout=60, report=print)"
        + "\ncheck(group)\ngroup.close()\nexit_process(0)\n"
    )
    url = f"tcp://127.0.0.1:{free_port()}"
    children = []
    for rank in range(world_size):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env = environment(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size), **ranks)
        children.append(
            subprocess.Popen(
                [sys.executable, str(script), url],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                universal_newlines=True,
            )
        )
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0] * world_size, outputs
    return [out for out, _ in outputs]


def test_values_reach_every_process_unchanged(tmp_path):
    outputs = run_group(
        """
        def check(group):
            state = {'a': torch.arange(6.).view(2, 3).t(), 'b': [1, 'x', None, {'c': torch.tensor(7)}]}
            state['empty'] = torch.zeros(0)
            got = group.broadcast(state if group.rank == 0 else None)
            assert torch.equal(got['a'], state['a']) and got['b'][:3] == [1, 'x', None], got
            assert int(got['b'][3]['c']) == 7 and got['empty'].numel() == 0
            assert group.any(group.rank == 1) and not group.any(False)
            assert group.sum([1, 2.5]) == [2.0, 5.0]
            import numpy as np
            array = np.array([-1, 5 * group.rank, 3])
            group.max_(array)
            assert array.tolist() == [-1, 5, 3]
            print('same')
        """,
        tmp_path,
    )
    assert outputs == ["same\n", "same\n"]


def test_different_flags_and_decoders_are_refused_on_every_process(tmp_path):
    outputs = run_group(
        """
        def check(group):
            check_same_flags(group, {'--batch-size': 8, 'the JPEG decoder': 'Pillow'})
            decoder = ['simplejpeg', 'Pillow'][group.rank]
            for name, value in (('--batch-size', 8 + group.rank), ('the JPEG decoder', decoder)):
                try:
                    check_same_flags(group, {'--epochs': 1, name: value})
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
    outputs = run_group(
        f"""
        def check(group):
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(20, 5))
            if {altered} and group.rank == 1:
                with torch.no_grad():
                    network[1].bias[3] *= 1 + 2 ** -20
            try:
                check_same_parameters(group, network)
                print('same')
            except DivergedError as error:
                print('different', 'rank 1 is one' in str(error))
        """,
        tmp_path,
    )
    assert outputs == (["different False\n", "different True\n"] if altered else ["same\n", "same\n"])


def test_a_non_finite_gradient_on_one_process_skips_the_step_on_both(tmp_path):
    outputs = run_group(
        """
        def check(group):
            accelerator = ComputeDevice('cpu', local_world_size=2)
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
            scaler = accelerator.prepare_training(network, lr=0.1, momentum=0.9, weight_decay=1e-4)
            model = accelerator.wrap_ddp(network)
            changed = []
            for step in range(5):
                before = [value.clone() for value in network.state_dict().values()]
                factor = {1: float('nan'), 3: float('inf')}.get(step, 1.0) if group.rank == 1 else 1.0
                scaler.backward((model(torch.randn(6, 4) * factor) ** 2).mean())
                scaler.step()
                after = list(network.state_dict().values())
                changed.append(not all(torch.equal(old, new) for old, new in zip(before[:2], after[:2])))
                assert all(torch.isfinite(value.float()).all() for value in after)
            check_same_parameters(group, network)
            print(changed, scaler.read_longest_skip())
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


def test_a_process_that_lost_another_exits_even_if_it_cannot_say_so():
    code = """
        import threading
        from engine.parallel.heartbeat import Heartbeat

        def report(text):
            raise OSError("no space left on the disk")

        heartbeat = object.__new__(Heartbeat)
        heartbeat.rank, heartbeat.failed, heartbeat.report, heartbeat.stopped = 1, False, report, threading.Event()
        threading.Thread(target=heartbeat._end, args=(0,)).start()
        threading.Event().wait(60)
    """
    begin = time.monotonic()
    assert run(sys.executable, "-c", textwrap.dedent(code)).code == 1
    assert time.monotonic() - begin < 30
