# SPDX-License-Identifier: BSD-3-Clause
"""Runs the fault tests of torture.sh. Each part injects faults into training and checks what is left.

A part prints what it sees and returns how often it tried; a fault that was not survived raises AssertionError.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
TEST = os.path.dirname(HERE)
sys.path[:0] = [os.path.dirname(TEST), TEST]
import engine  # noqa: E402,F401  # sets variables that torch reads when it is imported

from helpers.namespaces import NamespaceError  # noqa: E402

import torch  # noqa: E402
from file_faults import damage, disk, save_full, save_small, shared_memory, validation_counts  # noqa: E402
from jobs import SkippedError  # noqa: E402
from kill_faults import random_kills, random_kills_of_one, resumed_resumes  # noqa: E402
from process_faults import any_process, lost_ranks, network, second_signal, signals, torchrun  # noqa: E402

PARTS = [  # (part, fault, how it is injected)
    (save_small, "a save is killed", "strace: SIGKILL at each write, fsync, link and rename"),
    (save_full, "a save of VGG16 (1.1 GB) is killed", "the same"),
    (random_kills, "a run is killed", "SIGKILL to all its processes at random moments; 0, 1 or 3 workers"),
    (random_kills_of_one, "one of two processes, their launcher or a worker is killed", "SIGKILL at random moments"),
    (resumed_resumes, "a resumed run is resumed", "mid-epoch and between epochs; 0, 1, 3 workers; 1 and 2 processes"),
    (signals, "a signal", "SIGTERM, SIGINT, SIGUSR1 to the launcher, a rank, all; in training, validation, start-up"),
    (second_signal, "a second signal", "while the step cannot finish"),
    (lost_ranks, "a rank dies or is suspended", "SIGKILL, SIGSTOP to rank 0 and rank 1"),
    (network, "the network is cut", "two network namespaces, their bridge drops all packets"),
    (any_process, "any process dies", "SIGKILL to the launcher, rank 0, rank 1, a DataLoader worker"),
    (torchrun, "a process of torchrun --max-restarts dies", "SIGKILL to rank 1, rank 0, torchrun; static and c10d"),
    (disk, "the disk is full or read-only", "small tmpfs, ENOSPC by strace, RLIMIT_FSIZE, a read-only mount"),
    (shared_memory, "/dev/shm is full", "1 MB of it"),
    (damage, "a checkpoint is corrupt", "each byte flipped, each length truncated"),
    (validation_counts, "validation images not divisible by the batch size", "1 to 40 images on 1 to 4 processes"),
]


def run_parts(names: list[str], scratch: str | None) -> int:
    """Run the parts with these names, or all; print the table. Returns the exit code."""
    rows, code = [], 0
    for part, fault, how in PARTS:
        if names and part.__name__ not in names:
            continue
        print(f"=> {part.__name__}: {fault} ({how})", flush=True)
        folder = tempfile.mkdtemp(prefix="torture ", dir=scratch)
        begin, tries = time.monotonic(), ""
        try:
            tries = str(part(folder))
            result = "survived"
        except (SkippedError, NamespaceError) as error:
            result = f"skipped: {error}"
        except Exception:
            print(traceback.format_exc()[-3000:], flush=True)
            result, code = "NOT SURVIVED", 1
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        rows.append(f"| {fault} | {how} | {tries} | {result} |")
        print(f"   {result} after {time.monotonic() - begin:.0f} s", flush=True)
    print(f"\ntorch {torch.__version__}, Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}")
    print("\n".join(["| fault | how | times | result |", "|:--|:--|--:|:--|", *rows]))
    return code


def main() -> int:
    names = [part.__name__ for part, _, _ in PARTS]
    parser = argparse.ArgumentParser(prog="torture.sh", description="Fault tests; without arguments, all parts.")
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--scratch", metavar="DIR", help="folder to work in (default: the folder for temporary files)")
    args = parser.parse_args()
    unknown = set(args.parts) - set(names)
    if unknown:
        parser.error(f"unknown part {unknown.pop()}; --list lists the parts")
    if args.list:
        print("\n".join(names))
        return 0
    return run_parts(args.parts, args.scratch)


if __name__ == "__main__":
    sys.exit(main())
