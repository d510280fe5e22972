# SPDX-License-Identifier: BSD-3-Clause
"""Fault injection by strace: kill a process at a system call on given files, or make the call fail."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import Iterable

# The names under which the C library may make the call; aarch64 has only the *at forms. "?" skips unknown names.
_SYSTEM_CALLS = {"link": "?link,?linkat", "rename": "?rename,?renameat,?renameat2"}


@functools.lru_cache(maxsize=None)
def available() -> bool:
    """Whether strace is installed and allowed to trace; containers often forbid it."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], stderr=subprocess.DEVNULL).returncode == 0


def inject(call: str, paths: Iterable[str], fault: str, nth: int | None = None) -> list[str]:
    """The words to put in front of a command to inject a fault into its system call `call` on `paths`.

    `fault` is in strace's own words: "signal=KILL" kills the process before the call is made, "error=ENOSPC" makes the
    call fail. `nth`, counted from 1, picks one call; by default each call fails.
    """
    calls = _SYSTEM_CALLS.get(call, call)
    when = "" if nth is None else f":when={nth}"
    words = ["strace", "-qq", "-f", "-o", os.devnull, "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}{when}"]
    for path in paths:
        words += ["-P", path]
    return words


def checkpoint_paths(path: str) -> list[str]:
    """Every path that a save to `path` touches if its `also` is `path` + ".best"."""
    names = [path + ending for ending in ("", ".previous", ".best")]
    return [os.path.dirname(path), *names, *(name + ".tmp" for name in names)]
