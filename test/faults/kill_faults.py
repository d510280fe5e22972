# SPDX-License-Identifier: BSD-3-Clause
"""Runs that are killed or stopped and continued, again and again: they must end bitwise like an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from typing import Any, Callable, Union

from helpers import small

from jobs import COMMON, TWO_PROCESSES, checksum, intact_step, make_folder, run, train

FLAGS = ["-b", "32", "--epochs", "3", "--save-freq", "1", "-p", "20", "--ema-decay", "0.9"]  # 44 steps per epoch


class Fork:
    """main.py as a fork of this process, which has imported torch already: a hundred starts in minutes."""

    def __init__(self, flags: list[Any], folder: str) -> None:
        sys.stdout.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                log = os.open(os.path.join(folder, "log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                small.run([*COMMON, "--output-dir", folder, *map(str, flags)])
            finally:
                os._exit(1)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid != 0:
                self.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        return self.code is not None

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to all processes."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        deadline = time.monotonic() + 10  # in a container whose first process reaps nothing they stay as zombies
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:  # until the DataLoader workers are gone too
                os.killpg(self.pid, 0)
                time.sleep(0.005)


class OneOfTwo:
    """main.py with two processes, of which one is killed."""

    def __init__(self, flags: list[Any], folder: str) -> None:
        self.job = train(*flags, *TWO_PROCESSES, folder=folder)
        self.code: int | None = None

    def ended(self) -> bool:
        if self.code is None and self.job.child.poll() is not None:
            self.code = self.job.wait()
        return self.code is not None

    def kill(self, rng: random.Random) -> None:
        """SIGKILL to any one of the launcher, the ranks and their workers. The others must exit by themselves."""
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(rng.choice(self.job.processes()), signal.SIGKILL)
        self.job.wait()


Attempt = Union[Fork, OneOfTwo]


def kill_and_continue(folder: str, times: int, start: Callable[[list[Any], str], Attempt]) -> int:
    """Kill a run at random moments and continue it with 0, 1 or 3 workers; start a new run when it has finished."""
    undisturbed = make_folder(folder, "undisturbed")
    begin = time.monotonic()
    attempt = start([*FLAGS, "-j", 0], undisturbed)
    while not attempt.ended():
        time.sleep(0.01)
    assert attempt.code == 0, attempt.code
    seconds, expected = time.monotonic() - begin, checksum(undisturbed)
    kills = runs = 0
    rng = random.Random(6)
    while kills < times:
        killed = make_folder(folder, f"killed {runs}")
        while True:
            attempt = start([*FLAGS, "-j", rng.choice((0, 1, 3)), "--auto-resume"], killed)
            deadline = time.monotonic() + rng.uniform(0, 1) * seconds
            while not attempt.ended() and (time.monotonic() < deadline or kills >= times):
                time.sleep(0.005)
            if attempt.ended():
                break
            attempt.kill(rng)
            kills += 1
            if kills % 10 == 0:
                print(f"  {kills} kills, {runs} finished runs", flush=True)
        assert attempt.code == 0, attempt.code
        assert checksum(killed) == expected, "the killed run ended with other weights"
        runs += 1
        shutil.rmtree(killed)
    print(f"  {kills} kills, {runs} finished runs, each with the checksum of the undisturbed run")
    return kills


def random_kills(folder: str) -> int:
    return kill_and_continue(folder, 100, Fork)


def random_kills_of_one(folder: str) -> int:
    return kill_and_continue(folder, 15, OneOfTwo)


def resumed_resumes(folder: str) -> int:
    """Stop a run mid-epoch, at the end of an epoch, at the first step of the next; continue with other workers."""
    tries = 0
    for flags in ([], TWO_PROCESSES):
        base = ["-b", 128, "--epochs", 4, "-p", 5, *flags]  # 11 steps per epoch
        undisturbed = make_folder(folder, f"undisturbed {len(flags)}")
        resumed = make_folder(folder, f"resumed {len(flags)}")
        run(*base, folder=undisturbed)
        for stop, workers in ((5, 0), (11, 1), (12, 3), (22, 0), (30, 3), (1000, 1)):
            output = run(*base, "--auto-resume", "--stop-step-num", stop, "-j", workers, folder=resumed)
            assert ("=> resuming from" in output) == (stop > 5)
            tries += 1
        for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
            assert checksum(undisturbed, name) == checksum(resumed, name)
    # The last run had two processes: continue it on one, then on two again.
    base = ["-b", 128, "--epochs", 6, "-p", 5, "--auto-resume"]
    output = run(*base, "--stop-step-num", 50, folder=resumed)
    assert "=> resumed on 1 process, saved on 2" in output, output
    output = run(*base, *TWO_PROCESSES, folder=resumed)
    assert "=> resumed on 2 processes, saved on 1" in output and intact_step(resumed) == 66, output
    return tries + 2
