# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files and several processes: one that is killed while it saves, two that save in one folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from engine.checkpoints import file as checkpoint_file
from engine.checkpoints.file import CheckpointWriter, link, load, lock_folder
from engine.errors import UsageError
from engine.versions import TORCH

from helpers import strace
from helpers.program import environment

import pytest

LOCK = """
import sys, time
from engine.checkpoints.file import lock_folder
lock_folder(sys.argv[1])
print("locked", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_save_in_one_folder(tmp_path, monkeypatch):
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True, env=environment())
    assert other.stdout.readline() == "locked\n"
    monkeypatch.setattr(checkpoint_file, "LOCK_SECONDS", 1)
    with pytest.raises(UsageError, match="another run saves its checkpoints there"):
        lock_folder(str(tmp_path))
    monkeypatch.setattr(checkpoint_file, "LOCK_SECONDS", 30)
    threading.Timer(1, other.kill).start()
    lock_folder(str(tmp_path))  # waits for a run that is just ending
    other.wait()


def save(epoch: int, path: str) -> None:
    writer = CheckpointWriter()
    writer.save({"epoch": epoch}, path)
    assert writer.wait() is None


# For each path it reads: prints the number of a process that waits for a signal and then saves, and its wait status.
SAVE = """
import ctypes, os, signal, sys
from engine.checkpoints.file import CheckpointWriter
import torch

for line in sys.stdin:
    path, child = line.rstrip(), os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: strace is no parent of it
        os.kill(os.getpid(), signal.SIGSTOP)
        writer = CheckpointWriter()
        writer.save({"epoch": 2, "weights": torch.full((1000,), 2.0)}, path, also=path + ".best")
        os._exit(0 if writer.wait() is None else 1)
    os.waitpid(child, os.WUNTRACED)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def is_traced(process: int) -> bool:
    with open(f"/proc/{process}/status") as file:
        return re.search(r"TracerPid:\t[1-9]", file.read()) is not None


class Saver:
    """A process that saves in a process of its own each time."""

    def __init__(self) -> None:
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        command = [sys.executable, "-c", SAVE]
        self.process: Any = subprocess.Popen(command, universal_newlines=True, env=environment(), **pipes)

    def save(self, path: str, strace_words: list[str]) -> bool:
        """Save under strace. Return whether the process has ended by itself."""
        print(path, file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        tracer = subprocess.Popen([*strace_words, "-p", str(child)])
        while not is_traced(child):
            assert tracer.poll() is None, "strace could not trace the process"
            time.sleep(0.005)
        os.kill(child, signal.SIGCONT)
        status = int(self.process.stdout.readline())
        tracer.wait()
        assert status in (0, signal.SIGKILL), status
        return status == 0


@pytest.mark.skipif(TORCH < (2, 0), reason="the file is written alike on every torch: tested on torch 2")
@pytest.mark.skipif(not strace.available(), reason="strace is not installed, or not allowed to trace")
def test_a_kill_at_any_system_call_of_a_save_leaves_an_intact_checkpoint(tmp_path):
    """A save over an older checkpoint is killed at its first, second, … write, fsync, link and rename."""
    saver = Saver()
    found = {}  # (system call, its number) -> epoch of the checkpoint that is there after the kill
    for call in ("write", "fsync", "link", "rename"):
        for nth in range(1, 20):
            folder = tmp_path / f"{call} {nth}"
            folder.mkdir()
            path = str(folder / "x")
            for epoch in (0, 1):
                save(epoch, path)
            link(path, f"{path}.best")
            words = strace.inject(call, strace.checkpoint_paths(path), "signal=KILL", nth)
            finished = saver.save(path, words)
            found[call, nth] = load(path)["epoch"]
            assert load(f"{path}.best")["epoch"] in (found[call, nth], 2)  # the best of a saved epoch is there too
            assert load(f"{path}.previous")["epoch"] in (0, 1)
            best = load(f"{path}.best")
            save(3, path)  # not the best: it must not write into a file that the kill has left under two names
            assert load(path)["epoch"] == 3 and load(f"{path}.best")["epoch"] == best["epoch"]
            if finished:  # there is no nth call
                assert found[call, nth] == best["epoch"] == 2
                break
        else:
            raise AssertionError(call)
    assert set(found.values()) == {1, 2} and len(found) >= 10, found
    saver.process.communicate(timeout=30)
