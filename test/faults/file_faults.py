# SPDX-License-Identifier: BSD-3-Clause
"""Killed saves, full disks, corrupt files: an intact checkpoint must remain, and a corrupt one must be refused."""

from __future__ import annotations

import contextlib
import glob
import os
import resource
import shutil
import subprocess
import sys
import time

from engine.checkpoints.file import CheckpointWriter, load
from engine.errors import CheckpointError, CheckpointReadError
from engine.parallel import free_port

from helpers import strace

import torch
from jobs import (
    REPOSITORY,
    TWO_PROCESSES,
    Job,
    error_lines,
    intact_step,
    make_folder,
    mounted_tmpfs,
    require,
    run,
    train,
)

# --- a save that is killed --------------------------------------------------------------------------------------------

SAVE = """
import sys
from engine.checkpoints.file import CheckpointWriter
import torch

path, step = sys.argv[1], int(sys.argv[2])
tensors = [torch.full((int(count),), float(step)) for count in sys.argv[3].split(",")]
writer = CheckpointWriter()
writer.save({"step": step, "tensors": tensors}, path, also=path + ".best")
error = writer.wait()
assert error is None, error
"""


def kill_each_call(folder: str, counts: list[int]) -> int:
    """Kill a save at its first, second, ... write, fsync, link and rename, until one finishes before the kill.

    counts: elements of the tensors that are saved.
    """
    require(strace.available(), "strace")
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    sizes = ",".join(map(str, counts))
    original, path = os.path.join(folder, "original"), os.path.join(folder, "x")
    for step in (1, 2):  # the second save leaves `original`, `original.previous` and `original.best`
        subprocess.run([sys.executable, "-c", SAVE, original, str(step), sizes], check=True, env=environment)
    found, tries = set(), 0
    for call in ("write", "fsync", "link", "rename"):
        for nth in range(1, 30):
            for name in glob.glob(f"{path}*"):
                os.remove(name)
            for ending in ("", ".previous", ".best"):
                os.link(original + ending, path + ending)
            killer = strace.inject(call, strace.checkpoint_paths(path), "signal=KILL", nth)
            command = [*killer, sys.executable, "-c", SAVE, path, "3", sizes]
            finished = subprocess.run(command, stderr=subprocess.PIPE, env=environment)
            steps = [load(path + ending)["step"] for ending in ("", ".previous", ".best")]
            print(f"  killed at {call} {nth}: the files hold steps {steps}", flush=True)
            assert steps[0] in (2, 3) and steps[1] in (1, 2) and steps[2] in (2, 3), steps
            found.add(steps[0])
            # The next save must not write into a file that the kill has left under two names.
            writer = CheckpointWriter()
            writer.save({"step": 4}, path)
            assert (writer.wait(), load(path)["step"], load(path + ".best")["step"]) == (None, 4, steps[2])
            if finished.returncode == 0:
                assert steps == [3, 2, 3]
                break
            assert finished.returncode in (-9, 137), finished.stderr
            tries += 1
    assert found == {2, 3} and tries >= 9
    return tries


def save_small(folder: str) -> int:
    return kill_each_call(folder, [1000, 20])


def save_full(folder: str) -> int:
    """The 138,357,544 parameters of VGG16 and as many momentum values: 1.1 GB."""
    require(shutil.disk_usage(folder).free > 8e9, "8 GB of disk")
    return kill_each_call(folder, [138357544, 138357544])


# --- disk and memory --------------------------------------------------------------------------------------------------


def disk(folder: str) -> int:
    """A full disk, ENOSPC, a limited file size, a read-only folder."""
    tries = full_disk(folder)
    limited = make_folder(folder, "limited")
    flags = ["-b", 64, "--epochs", 1, "-p", 10, "--save-freq", 10]
    output = run(*flags, folder=limited, code=1, preexec_fn=limit_file_size)
    assert "checkpoint not saved" in output and len(error_lines(output)) == 1, output
    assert not glob.glob(os.path.join(limited, "*.pth*"))
    tries += 1
    for call in ("write", "fsync", "rename") if strace.available() else ():
        traced = make_folder(folder, call)
        run("-b", 64, "--stop-step-num", 10, folder=traced)
        prefix = strace.inject(call, [os.path.join(traced, "checkpoint.pth.tar.tmp")], "error=ENOSPC")
        output = run("-b", 64, "--epochs", 2, "-p", 10, "--auto-resume", folder=traced, code=1, prefix=prefix)
        assert output.count("checkpoint not saved") == 1 and len(error_lines(output)) == 1, output
        assert intact_step(traced) == 10
        tries += 1
    readonly = make_folder(folder, "read only")
    with mounted_tmpfs(readonly, "ro"):
        job = train("--output-dir", readonly, folder=folder)
        assert job.wait() == 2 and len(error_lines(job.output())) == 1 and "Read-only" in job.output(), job.output()
    return tries + 1


def full_disk(folder: str) -> int:
    """Fill the disk during a run: for a while, when training must continue, and until the last checkpoint."""
    small = make_folder(folder, "small")
    filler = os.path.join(small, "filler")
    with mounted_tmpfs(small, "size=3m"):
        for stays_full in (False, True):
            flags = ["-b", 64, "--epochs", 3 if stays_full else 6, "--save-freq", 1, "-p", 1]  # 22 steps per epoch
            run(*flags, "--stop-step-num", 3, folder=folder)
            for name in ("checkpoint.pth.tar", "checkpoint.pth.tar.previous"):
                shutil.copy(os.path.join(folder, name), small)
            job = train(*flags, "--auto-resume", "--output-dir", small, folder=folder)
            job.wait_for("Epoch")
            with contextlib.suppress(OSError), open(filler, "wb", 0) as file:
                while True:
                    file.write(bytes(4096))
            if stays_full:
                code, output = job.wait(), job.output()
                assert code == 1 and "checkpoint not saved" in output, output
                lines = error_lines(output)
                assert len(lines) == 1 and "could not write the last checkpoint" in lines[0], output
                os.remove(filler)
                assert intact_step(small) >= 3
                print("  full until the end: exit code 1, the checkpoint is intact", flush=True)
            else:
                job.wait_for("checkpoint not saved")
                # Not intact_step: the next save may have its temporary file there by now.
                step = load(os.path.join(small, "checkpoint.pth.tar"))["step"]
                os.remove(filler)
                assert job.wait(200) == 0, job.output()
                assert step < intact_step(small) == 6 * 22
                print("  full for a while: exit code 0, the checkpoint is intact", flush=True)
            for name in os.listdir(small):
                path = os.path.join(small, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return 2


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))


def shared_memory(folder: str) -> int:
    """1 MB of /dev/shm, with one process and with two."""
    tries = 0
    with mounted_tmpfs("/dev/shm", "size=1m"):
        for flags in ([], TWO_PROCESSES):
            begin = time.monotonic()
            output = run("-b", 512, "-j", 2, *flags, folder=folder, code=1)
            lines = error_lines(output)
            print(f"  {time.monotonic() - begin:.0f} s: {lines}", flush=True)
            assert any("--shm-size" in line and "--workers 0" in line for line in lines), output
            tries += 1
    return tries


# --- contents ---------------------------------------------------------------------------------------------------------


def damage(folder: str) -> int:
    """Flip the lowest and the highest bit of each byte of a small checkpoint; truncate it to each length."""
    path = os.path.join(folder, "x")
    writer = CheckpointWriter()
    writer.save({"weights": torch.arange(50.0), "epoch": 3}, path)
    assert writer.wait() is None
    with open(path, "rb") as file:
        content = file.read()
    variants = [content[:length] for length in range(len(content))]
    for position in range(len(content)):
        for bit in (1, 128):
            variants.append(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
    for variant in variants:
        with open(path, "wb") as file:
            file.write(variant)
        try:
            loaded = load(path)
        except CheckpointError as error:
            assert not isinstance(error, CheckpointReadError), error  # --auto-resume would not fall back
            continue
        # If the mark of the checksum is corrupt, the file is read like another program's, and zip's own CRCs hold.
        assert torch.equal(loaded["weights"], torch.arange(50.0)) and loaded["epoch"] == 3
    return len(variants)


def validation_counts(folder: str) -> int:
    """1 to 40 validation images on 1 to 4 processes, with batch sizes that do not divide them (counts.py)."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "counts.py")
    for count in range(1, 5):
        url = f"tcp://127.0.0.1:{free_port()}"
        jobs = []
        for rank in range(count):
            prefix = ["env", f"PYTHONPATH={REPOSITORY}"]
            jobs.append(Job(script, url, rank, count, rank, count, folder=folder, prefix=prefix))
        for job in jobs:
            assert job.wait(200) == 0, job.output()
    return 160
