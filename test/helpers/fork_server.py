# SPDX-License-Identifier: BSD-3-Clause
"""A process that has imported torch and main.py, and forks to run a script: it costs 0.1 s, a start of Python 1.9 s.

Reads a line of JSON for each script: its argv, cwd, env, and the pipes for its output. Answers with the process's
number and then its exit code. Each script has a process of its own, as after any other start, except that all share one
PYTHONHASHSEED; processes that it spawns have their own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import runpy
import sys

from helpers import small  # noqa: F401  imports main.py and torch, with one thread

import numpy as np

# What torch and a run import later, when they need it.
for _name in ("torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)


def become(argv: list[str], cwd: str | None, env: dict[str, str], out: str, err: str) -> None:
    """Make this process what the script would find if it were started."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    random.seed()
    np.random.seed()
    sys.argv = argv


def serve() -> None:
    print("ready", flush=True)
    while True:
        request = sys.stdin.readline()
        if not request:
            return
        child = os.fork()
        if child == 0:
            become(**json.loads(request))
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        print(child, flush=True)
        status = os.waitpid(child, 0)[1]
        print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    serve()
