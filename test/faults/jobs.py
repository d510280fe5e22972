# SPDX-License-Identifier: BSD-3-Clause
"""Runs of main.py for the fault tests, and what is checked after them. The network is that of helpers/small.py."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any, Iterator, Sequence

from engine.checkpoints.file import load
from engine.parallel import free_port

from helpers import small

import torch

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = small.__file__
# Without --lr and --warmup-epochs, the embedded digits have defaults that depend on --epochs.
COMMON = ["--arch", "vgg11", "--device", "cpu", "--lr", "0.01", "--warmup-epochs", "0", "--eval-freq", "1"]
TWO_PROCESSES = ["--multiprocessing-distributed", "--device-list", "0,1"]
ENDLESS = ["-b", "32", "--epochs", "100000", "--eval-freq", "100000", "-p", "1"]
SECONDS_TO_EXIT = 60
ERROR_LINE = re.compile(r"^main\.py: error: .*$")


class SkippedError(Exception):
    """A part that cannot run here. The text says what is missing."""


def require(condition: Any, what: str) -> None:
    if not condition:
        raise SkippedError(f"requires {what}")


# --- runs -------------------------------------------------------------------------------------------------------------


class Job:
    """A Python command in its own session, with its output in a log file.

    All its processes carry a variable in their environment, by which those that are left behind are found.
    """

    def __init__(self, *command: Any, folder: str, prefix: Sequence[str] = (), **options: Any) -> None:
        self.mark = f"TORTURE={os.getpid()}.{time.monotonic()}"
        self.log = os.path.join(folder, f"log.{time.monotonic()}")
        name, _, value = self.mark.partition("=")
        words = [*prefix, sys.executable, "-u", *map(str, command)]
        environment = {**os.environ, name: value}
        with open(self.log, "w") as log:
            self.child = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment, **options
            )

    def output(self) -> str:
        with open(self.log, errors="replace") as file:
            return file.read()

    def processes(self) -> list[int]:
        """The process ids of the job that are alive."""
        found = []
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError), open(path, "rb") as environment:
                if self.mark.encode() in environment.read().split(b"\0"):
                    pid = int(path.split("/")[2])
                    with open(f"/proc/{pid}/stat") as stat:
                        state = stat.read().rpartition(")")[2].split()[0]
                    if state != "Z":  # a zombie
                        found.append(pid)
        return sorted(found)

    def children(self, parent: int | None = None) -> list[int]:
        """The process ids of the children of a process, by default of the first one of the job."""
        parent = parent or self.child.pid
        with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{parent}/children") as file:
            return [int(word) for word in file.read().split()]
        return []

    def wait_for(self, text: str, seconds: float = 90, times: int = 1) -> None:
        """Wait until the job has printed a text that often. Raises AssertionError if it exits before."""
        deadline = time.monotonic() + seconds
        while self.output().count(text) < times:
            end = self.output()[-2000:]
            assert self.child.poll() is None, f"exited with code {self.child.returncode} before {text!r}: {end}"
            assert time.monotonic() < deadline, f"no {text!r} within {seconds} s: {end}"
            time.sleep(0.02)

    def wait(self, seconds: float = SECONDS_TO_EXIT) -> int:
        """Wait until every process of the job is gone; return the exit code. Raises AssertionError if one is left."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(seconds)
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.processes()
        if left:
            self.kill()
            raise AssertionError(f"still running after {seconds} s: processes {left}: {self.output()[-3000:]}")
        return self.child.returncode

    def kill(self) -> None:
        """SIGKILL to all processes of the job."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()


def train(*flags: Any, folder: str, **options: Any) -> Job:
    """Start main.py with these flags, with `folder` as the output folder."""
    return Job(SMALL, *COMMON, "--output-dir", folder, *flags, folder=folder, **options)


def run(*flags: Any, folder: str, code: int = 0, **options: Any) -> str:
    """Run main.py with these flags and return its output. Raises AssertionError if the exit code is another one."""
    job = train(*flags, folder=folder, **options)
    exit_code = job.wait(300)
    assert exit_code == code, f"exit code {exit_code}, expected {code}: {job.output()[-3000:]}"
    return job.output()


def start_nodes(
    folder: str,
    count: int,
    master: str = "127.0.0.1",
    prefixes: Sequence[Sequence[str]] | None = None,
    flags: Sequence[str] = (),
) -> list[Job]:
    """Start a job of `count` nodes with one process each.

    master: address of node 0. prefixes: the words in front of each node's command.
    """
    port = free_port()
    jobs = []
    for rank in range(count):
        own = make_folder(folder, f"node {rank} {port}")
        topology = ["--world-size", count, "--rank", rank, "--dist-url", f"tcp://{master}:{port}"]
        prefix = prefixes[rank] if prefixes else ()
        jobs.append(train(*ENDLESS, "-j", 1, *topology, *flags, folder=own, prefix=prefix))
    return jobs


# --- checks -----------------------------------------------------------------------------------------------------------


def error_lines(output: str) -> list[str]:
    """The error lines of an output. Raises AssertionError if there is a traceback."""
    for sign in ("Traceback", "terminate called"):
        assert sign not in output, output[output.index(sign) :][:3000]
    return [line for line in output.splitlines() if ERROR_LINE.match(line)]


def checksum(folder: str, name: str = "checkpoint.pth.tar") -> str:
    """The SHA-256 of everything that a checkpoint holds; of tensors, bit for bit."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in value:
                total.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, torch.Tensor):
            total.update(str(value.dtype).encode() + value.contiguous().numpy().tobytes())
        else:
            total.update(repr(value).encode())

    add(load(os.path.join(folder, name)))
    return total.hexdigest()


def intact_step(folder: str) -> int:
    """The step of the checkpoint in a folder. Raises CheckpointError if it is corrupt.

    Raises AssertionError if a temporary file was left beside it.
    """
    assert not glob.glob(os.path.join(folder, "*.tmp*")), os.listdir(folder)
    return load(os.path.join(folder, "checkpoint.pth.tar"))["step"]


# --- folders ----------------------------------------------------------------------------------------------------------


def make_folder(*parts: str) -> str:
    path = os.path.join(*parts)
    os.mkdir(path)
    return path


@contextlib.contextmanager
def mounted_tmpfs(path: str, options: str) -> Iterator[None]:
    """Mount a tmpfs on a folder. Raises SkippedError unless torture.sh has made a mount namespace for it."""
    require(os.environ.get("TORTURE_MAY_MOUNT"), "root and mount namespaces")
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)
