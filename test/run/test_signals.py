# SPDX-License-Identifier: BSD-3-Clause
"""Stop signals inside one process, and how it exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

from helpers.program import environment, run

import pytest

WAIT = """
import sys, time
from engine.signals import StopSignals
stop = StopSignals()
stop.training = {training}
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
print("stopping", flush=True)
{then}
"""


def start(training: bool, then: str = "", stderr: Any = None) -> subprocess.Popen:
    code = WAIT.format(training=training, then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, universal_newlines=True, env=environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_sets_the_flag_while_training(number):
    process = start(training=True)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "stopping\n" and process.returncode == 0


@pytest.mark.parametrize("stderr", [os.devnull, "/dev/full"])
def test_a_signal_before_training_exits_at_once_with_75(stderr):
    """Also if its message cannot be printed, as on a full disk."""
    with open(stderr, "w") as file:
        process = start(training=False, stderr=file)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 75


def test_ctrl_c_in_a_script_is_no_traceback():
    code = "import os, signal, time; from engine.console import run_script; "
    code += "run_script(lambda: [os.kill(os.getpid(), signal.SIGINT), time.sleep(60)])"
    result = run(sys.executable, "-c", code)
    assert (result.code, result.out, result.err) == (128 + signal.SIGINT, "", "")


def test_a_second_signal_exits_at_once_but_not_within_two_seconds():
    """The main thread hangs in C, where Python runs no signal handler."""
    hang = "stop.first -= {seconds}; print('hanging', flush=True); import ctypes; "
    hang += "[ctypes.CDLL(None).sleep(60) for _ in range(9)]"
    process = start(training=True, then=hang.format(seconds=0))
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["stopping\n", "hanging\n"]
    process.send_signal(signal.SIGTERM)  # the terminal's copy of the first
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.kill()
    process.communicate()
    process = start(training=True, then=hang.format(seconds=3))
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["stopping\n", "hanging\n"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT


def test_a_process_dies_with_its_parent(tmp_path):
    """The parent is killed; the child's end of a pipe closes when it dies."""
    if sys.platform != "linux":
        pytest.skip("the kernel of Linux does this")
    child = "import os, time; from engine.signals import die_with_parent; die_with_parent({parent}); time.sleep(600)"
    parent = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}.format(parent=os.getpid())]); "
        "print('started', flush=True); time.sleep(600)"
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        stderr=write,
        pass_fds=[write],
        env=environment(),
        universal_newlines=True,
    )
    os.close(write)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.kill()
    process.communicate()
    while os.read(read, 4096):  # ends when no process holds the pipe any more
        pass
