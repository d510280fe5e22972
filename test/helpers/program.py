# SPDX-License-Identifier: BSD-3-Clause
"""The scripts as a user runs them, and what they leave."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from engine.checkpoints.file import load

import torch

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MAIN = os.path.join(REPOSITORY, "main.py")
SMALL_MAIN = os.path.join(REPOSITORY, "test", "helpers", "small.py")
# A script, its __main__ part too, on small.py's network.
RUN_SCRIPT = """
import runpy, sys
import helpers.small
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TWO = ["--multiprocessing-distributed", "--device-list", "0,1"]


class Result:
    """A finished command: its exit code and its output."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def accuracy(self) -> tuple[str, str]:
        """(Acc@1, Acc@5) of the last validation, as printed."""
        words = [line for line in self.out.splitlines() if "[AVG-ACC]" in line][-1].split()
        return words[words.index("Acc@1") + 1], words[words.index("Acc@5") + 1]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a test's process: the repository and test/ can be imported."""
    paths = [REPOSITORY, os.path.join(REPOSITORY, "test"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **changes}


def run(*command: Any, timeout: float = 300, cwd: Any = None, env: dict[str, str] | None = None) -> Result:
    """Run a command to its end."""
    finished = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**(env or {})),
    )
    return Result(finished.returncode, finished.stdout, finished.stderr)


class ForkServer:
    """The process of fork_server.py. It ends with this one, which holds the other end of its stdin."""

    def __init__(self) -> None:
        code = os.path.join(REPOSITORY, "test", "helpers", "fork_server.py")
        # stderr is a pipe too: a script finds its streams as they are made when Python starts.
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, code]
        self.process: Any = subprocess.Popen(command, universal_newlines=True, env=environment(), **pipes)
        self.works = self.process.stdout.readline() == "ready\n"  # else the script itself says why not

    def run(self, argv: list[str], timeout: float, cwd: Any) -> Result:
        outputs = {}

        def read(name: str, path: str) -> None:
            with open(path) as pipe:
                outputs[name] = pipe.read()

        with tempfile.TemporaryDirectory() as folder:
            pipes = {name: os.path.join(folder, name) for name in ("out", "err")}
            for path in pipes.values():
                os.mkfifo(path)
            readers = [threading.Thread(target=read, args=pipe, daemon=True) for pipe in pipes.items()]
            for reader in readers:
                reader.start()
            request = {"argv": argv, "cwd": cwd and str(cwd), "env": environment(), **pipes}
            print(json.dumps(request), file=self.process.stdin, flush=True)
            child, deadline = int(self.process.stdout.readline()), time.monotonic() + timeout
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            late = any(reader.is_alive() for reader in readers)
            if late:
                os.kill(child, signal.SIGKILL)
            code = int(self.process.stdout.readline())
        if late:
            raise subprocess.TimeoutExpired(argv, timeout)
        return Result(code, outputs["out"], outputs["err"])


@functools.lru_cache(maxsize=None)
def fork_server() -> ForkServer:
    return ForkServer()


def run_script(
    name: str, *flags: Any, timeout: float = 300, cwd: Any = None, env: dict[str, str] | None = None
) -> Result:
    """Run `python NAME FLAGS`, a script of the repository, to its end, with small.py's threads.

    Quickly, unless it needs variables, which Python or torch may read when they start.
    """
    argv = [os.path.join(REPOSITORY, name), *map(str, flags)]
    if env is None and sys.platform == "linux" and fork_server().works:
        return fork_server().run(argv, timeout, cwd)
    return run(sys.executable, "-c", RUN_SCRIPT, *argv, timeout=timeout, cwd=cwd, env=env)


def run_main(*flags: Any, program: str = SMALL_MAIN, **options: Any) -> Result:
    """Run `python main.py FLAGS` on the CPU; with small.py's network unless program=MAIN."""
    flags = ("--device", "cpu", *flags)
    return (
        run_script(program, *flags, **options)
        if program == SMALL_MAIN
        else run(sys.executable, program, *flags, **options)
    )


def start_main(*flags: Any) -> subprocess.Popen:
    """Start main.py with small.py's network, and do not wait for it."""
    command = [sys.executable, "-u", SMALL_MAIN, "--device", "cpu", *(str(flag) for flag in flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment()
    )


def wait_for_line(process: subprocess.Popen, start: str) -> None:
    """Read a process's output until a line starts so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the process exited before a line {start!r}")


def run_python(code: str, *args: Any, **env: str) -> list[str]:
    """Run code in a process of its own, for instance because it changes torch for good. Returns its output lines.

    It ends as the program does: after a backward pass, torch 1.8 sometimes hangs while Python shuts down.
    """
    code += "\nfrom engine.console import exit_process\nexit_process(0)\n"
    result = run(sys.executable, "-c", code, *args, timeout=120, env=env)
    assert result.code == 0, result.err
    return result.out.splitlines()


def events(folder: Any, kind: str | None = None) -> list[dict]:
    """The records of metrics.jsonl."""
    with open(os.path.join(str(folder), "metrics.jsonl")) as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if kind in (None, record["event"])]


def weights(path: Any) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint."""
    return load(str(path))["state_dict"]


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False
