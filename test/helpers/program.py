# SPDX-License-Identifier: BSD-3-Clause
"""The scripts as a user runs them, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import Any

from engine.checkpoints.file import load

import torch

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
MAIN = os.path.join(REPOSITORY, "main.py")
SMALL_MAIN = os.path.join(REPOSITORY, "test", "helpers", "small.py")
TWO = ["--multiprocessing-distributed", "--device-list", "0,1"]


class Result:
    """A finished command: its exit code and its output."""

    def __init__(self, finished: subprocess.CompletedProcess) -> None:
        self.code, self.out, self.err = finished.returncode, finished.stdout, finished.stderr

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
    return Result(
        subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env=environment(**(env or {})),
        )
    )


def run_main(*flags: Any, program: str = SMALL_MAIN, **options: Any) -> Result:
    """Run `python main.py FLAGS` on the CPU; with small.py's network unless program=MAIN."""
    return run(sys.executable, program, "--device", "cpu", *flags, **options)


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
